"""What the records say.

measures.py     from records to TTFT, TPOT, ITL, goodput and the rest
statistics.py   percentiles, and tests of whether the samples prove anything
correctness.py  whether every answer came from whom it was asked of, and whole
canaries.py     requests whose right answer is known
aliases.py      which version may answer a name, and since when
validity.py     whether the client drove the load that the tape asks for, and in time
verdict.py      MEETS, DOES NOT MEET or INCONCLUSIVE, for each requirement and all together
paired.py       two targets on the same tapes: ratios with intervals
"""
