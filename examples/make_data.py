"""Write the training and held-out rows of the three demo adapters.

Deterministic. Held-out rows are honest: neither their sentence patterns nor what fills them (items, cities, parties, file
names, numbers, ...) is in any row that is trained on.

    python examples/make_data.py

Each row of `train.jsonl` and `heldout.jsonl` is {"prompt": ..., "completion": ...}. The phrases below are ours.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED = 20261124

ITEMS = [
    "kettle",
    "backpack",
    "desk lamp",
    "headset",
    "office chair",
    "router",
    "tent",
    "keyboard",
    "blender",
    "jacket",
]
DAYS = ["Monday", "last week", "two days ago", "the 3rd", "yesterday", "Friday"]
CITIES = ["Lyon", "Leeds", "Austin", "Graz", "Osaka", "Porto"]
NEW_ITEMS = [
    "toaster",
    "suitcase",
    "monitor",
    "speaker",
    "bookshelf",
    "printer",
    "bicycle",
    "mouse pad",
    "vacuum cleaner",
    "raincoat",
]
NEW_DAYS = ["Tuesday", "this morning", "the 21st", "Sunday", "three weeks ago", "Wednesday"]
NEW_CITIES = ["Bergen", "Seville", "Denver", "Turin", "Kyoto", "Dublin"]
OPENERS = ["", "", "Hello, ", "Hi team, ", "Good morning. ", "Please help: "]
CLOSERS = ["", "", " Thanks.", " Please look into it.", " Regards, Ana.", " I am waiting."]

# Templates in each list: the last HELD_OUT ones are never trained on.
HELD_OUT = 4
SUPPORT = {
    "billing": [
        "I was charged twice for the {item}.",
        "The invoice from {day} shows the wrong amount.",
        "Why is there an extra fee on my card statement?",
        "My credit card was billed for a {item} that I did not buy.",
        "Can you send me a copy of the receipt for the {item}?",
        "The discount code was not taken off the total price.",
        "I need an invoice with our VAT number on it.",
        "The price on my bill differs from the price on the website.",
        "Your company took 40 euros from my bank account on {day}.",
        "I paid for the {item} by card but the payment shows as pending.",
        "Please correct the tax on invoice 2231.",
        "There is a payment on my statement that I do not recognise.",
        "My refund for the {item} has not reached my bank account.",
        "How much did I pay for the {item}? The receipt is missing.",
        "I would like to pay the invoice by bank transfer.",
        "My card payment was declined, although there is money in the account.",
        "I got two invoices for one {item}.",
        "The amount charged on {day} is too high.",
        "My bank statement lists a charge for a {item}, but I never paid for one.",
        "The receipt for the {item} shows the wrong price.",
    ],
    "shipping": [
        "My {item} has not arrived yet.",
        "The parcel was sent to {city} instead of my address.",
        "The tracking number has not moved since {day}.",
        "When will the {item} be delivered?",
        "The courier left the package in the rain.",
        "I ordered a {item} and the box arrived empty.",
        "Can you ship the {item} to {city}?",
        "The delivery was promised for {day} and nobody came.",
        "The package arrived open and the {item} is missing.",
        "How long does shipping to {city} take?",
        "I want to change the delivery address to {city}.",
        "The carrier says that the parcel was returned to the warehouse.",
        "Tracking says delivered, but there is no package at my door.",
        "The {item} is stuck in customs in {city}.",
        "Could the courier bring the {item} on {day}?",
        "The parcel with my {item} seems to be lost.",
        "Where is the parcel with my {item}?",
        "The courier delivered the {item} to a neighbour in {city}.",
        "My delivery is late: the {item} should have been here on {day}.",
        "Tracking shows that the package with the {item} is still in {city}.",
    ],
    "technical": [
        "The app crashes when I open it.",
        "The {item} does not turn on any more.",
        "I see error 504 on every page.",
        "The screen of the {item} flickers.",
        "The website does not load in my browser.",
        "The {item} keeps losing the wifi connection.",
        "After the update the app freezes on start.",
        "The bluetooth of the {item} will not pair with my phone.",
        "The {item} makes a loud noise and then stops working.",
        "I get an error message when I press the save button.",
        "The firmware update of the {item} failed.",
        "The app is very slow and crashes on {day}s.",
        "The buttons on the {item} do not react.",
        "The page shows a server error when I search for a {item}.",
        "The {item} overheats and switches itself off.",
        "The app shows a blank screen after the update.",
        "The {item} stopped working after the firmware update.",
        "The app freezes and shows an error message.",
        "The website crashes whenever I look at the {item}.",
        "My {item} does not connect to the wifi.",
    ],
    "account": [
        "I forgot my password.",
        "I cannot log in since {day}.",
        "Please change the email address of my account.",
        "My account is locked after too many attempts.",
        "The password reset mail never comes.",
        "How do I change my user name?",
        "Someone else has logged in to my account.",
        "I want to turn on two-factor login.",
        "The login code is not sent to my phone.",
        "Please add my colleague as a user of our account.",
        "I have two accounts and want to merge them.",
        "My profile shows the wrong name.",
        "The sign-in page says that my user does not exist.",
        "How can I update the phone number in my profile?",
        "I lost the phone with my two-factor codes.",
        "My email address changed, please update my login.",
        "The login page does not accept my password.",
        "I need to reset the password of my account.",
        "Please unlock my user, I cannot sign in.",
        "I want a different email address in my profile.",
    ],
    "cancel": [
        "Please cancel my order of the {item}.",
        "I want to end my subscription.",
        "I changed my mind and do not want the {item} any more.",
        "How do I cancel the membership?",
        "Stop my monthly plan from {day} on.",
        "I ordered the {item} by mistake, please cancel it.",
        "Please do not renew my subscription.",
        "I would like to withdraw from the contract.",
        "Cancel everything that I ordered on {day}.",
        "I no longer need the service, please close the contract.",
        "Is it still possible to cancel the order for the {item}?",
        "We want to terminate our yearly plan.",
        "Please take back my order, I bought the {item} elsewhere.",
        "I want to stop the subscription before it renews.",
        "End my trial, I do not want to continue.",
        "Cancel the {item}, I found a better one.",
        "I do not want to renew the yearly plan, please end it.",
        "Please cancel the {item} that I ordered on {day}.",
        "How can I cancel my monthly subscription?",
        "I ordered a {item} but I do not want it any more.",
    ],
}

PARTIES = ["the Supplier", "the Customer", "the Licensee", "the Contractor", "either Party", "the Receiving Party"]
STATES = ["Delaware", "England", "Ireland", "New York", "Ontario", "Singapore"]
NUMBERS = ["thirty", "sixty", "ninety", "ten", "fourteen", "forty-five"]
NEW_PARTIES = ["the Vendor", "the Client", "the Buyer", "the Consultant", "the Distributor", "the Disclosing Party"]
NEW_STATES = ["Texas", "Scotland", "Quebec", "California", "Victoria", "Hong Kong"]
NEW_NUMBERS = ["twenty", "seven", "twenty-one", "one hundred", "fifteen", "one hundred and eighty"]
LEGAL = {
    "confidentiality": [
        "{P} shall keep the disclosed information secret and use it only for this project.",
        "{P} shall not disclose Confidential Information to any third party.",
        "Confidential Information remains the property of the party that disclosed it.",
        "{P} shall protect trade secrets with at least reasonable care.",
        "The duty of secrecy survives for {n} months after the end of this Agreement.",
        "{P} may share Confidential Information only with employees who need to know it.",
        "Information that is already public is not Confidential Information.",
        "{P} shall return or destroy all confidential documents within {n} days.",
        "No press release shall reveal the existence of this Agreement without consent.",
        "{P} shall mark secret documents as confidential.",
        "{P} shall not reveal any trade secret to a competitor.",
        "All documents marked confidential shall be kept secret by {p}.",
        "{P} shall not disclose secret information without written consent.",
        "Confidential documents shall be destroyed within {n} days on request.",
    ],
    "termination": [
        "{P} may terminate this Agreement on {n} days' written notice.",
        "This Agreement ends at once if {p} becomes insolvent.",
        "{P} may end this Agreement if a breach is not cured within {n} days.",
        "On expiry of the term this Agreement shall end without further notice.",
        "Termination does not affect rights that accrued before the date of termination.",
        "{P} may terminate for convenience after the first year.",
        "If force majeure lasts more than {n} days, {p} may terminate.",
        "Upon termination {p} shall stop using the Software.",
        "This Agreement may be terminated immediately for material breach.",
        "Either side may give notice to end the contract after {n} months.",
        "{P} may terminate this Agreement immediately if {p2} becomes insolvent.",
        "A notice of termination takes effect {n} days after it is received.",
        "This contract ends on {n} days' notice by {p}.",
        "{P} may end the Agreement for material breach that is not cured.",
    ],
    "liability": [
        "In no event shall {p} be liable for indirect or consequential damages.",
        "The total liability of {p} is limited to the fees paid in the last twelve months.",
        "{P} is not liable for lost profits or lost data.",
        "Nothing in this Agreement limits liability for death or personal injury.",
        "Liability under this Agreement is capped at {n} thousand dollars.",
        "{P} excludes all liability for punitive damages.",
        "The cap on damages does not apply to wilful misconduct.",
        "{P} shall not be liable for delay caused by events beyond its control.",
        "Damages are limited to the amount of the last {n} invoices.",
        "The aggregate liability of {p} shall not exceed the contract price.",
        "{P} shall not be liable for any loss of profit.",
        "The maximum liability of {p} is {n} thousand dollars.",
        "Consequential damages are excluded, and total liability is capped.",
        "In no case does the liability of {p} exceed the fees paid.",
    ],
    "payment": [
        "{P} shall pay each invoice within {n} days of receipt.",
        "Late payments bear interest at one percent a month.",
        "All fees are payable in advance and are not refundable.",
        "Prices are stated without value added tax.",
        "{P} shall reimburse reasonable travel expenses.",
        "The annual fee is due on the first day of each contract year.",
        "{P} may raise the fees by up to three percent a year.",
        "Invoices shall be issued monthly in arrears.",
        "{P} may withhold the disputed part of an invoice.",
        "Payment shall be made by bank transfer in euros.",
        "Each invoice is due {n} days after it is issued.",
        "{P} shall pay interest on any fee that is paid late.",
        "The monthly fee shall be paid by bank transfer within {n} days.",
        "All prices and fees are payable on receipt of the invoice.",
    ],
    "governing law": [
        "This Agreement is governed by the laws of {state}.",
        "The courts of {state} have exclusive jurisdiction.",
        "Any dispute shall be settled by arbitration in {state}.",
        "The law of {state} applies, without its conflict of law rules.",
        "The parties submit to the jurisdiction of the courts of {state}.",
        "The United Nations convention on the sale of goods does not apply.",
        "The place of arbitration is {state} and its language is English.",
        "Disputes shall first be brought before a mediator in {state}.",
        "The parties waive the right to a jury trial in {state}.",
        "The validity of this Agreement is determined under the laws of {state}.",
        "The laws of {state} govern this Agreement and any dispute.",
        "All disputes go to the courts of {state}.",
        "This contract is subject to the law of {state}.",
        "Arbitration under this Agreement takes place in {state}.",
    ],
}

# What fills the slots of a task, each kind once for training and once for the held-out rows.
TRAINED = {
    "d": ["logs", "src", "data", "backup", "reports", "photos", "build", "docs", "cache", "music", "videos", "tests"],
    "f": [
        "notes.txt",
        "app.log",
        "users.csv",
        "main.py",
        "config.yaml",
        "report.pdf",
        "todo.md",
        "server.log",
        "a.json",
        "db.sql",
    ],
    "e": ["py", "log", "csv", "txt", "json", "md", "jpg", "yaml"],
    "w": ["error", "timeout", "admin", "TODO", "warning", "token", "failed", "retry"],
    "t": ["orders", "users", "products", "payments", "tickets", "invoices", "customers", "events", "books", "cities"],
    "c": ["price", "age", "city", "status", "name", "total", "country", "score", "email", "width"],
    "p": ["8080", "5432", "443", "3000", "9090", "6379"],
    "n": ["5", "10", "20", "25", "50", "100", "200", "7", "12", "365"],
}
HELD = {
    "d": ["images", "scripts", "archive", "drafts"],
    "f": ["readme.txt", "access.log", "stock.csv", "tool.py"],
    "e": ["html", "xml", "png", "css"],
    "w": ["refused", "password", "debug", "missing"],
    "t": ["sales", "employees", "reviews", "shipments"],
    "c": ["weight", "rating", "salary", "region"],
    "p": ["8000", "27017", "22", "5000"],
    "n": ["3", "15", "30", "500"],
}
# Wordings that are trained on, one that is held out, and the command.
CODE = [
    (["list the files in {d}", "show what is in the folder {d}", "what files are in {d}?"], "which files are in the folder {d}?", "ls {d}"),
    (["list all files in {d} with their sizes", "show {d} in long format with hidden files", "list {d} with sizes and hidden files"], "show all files in {d} with their sizes", "ls -la {d}"),
    (["find all {e} files in {d}", "find every file ending in .{e} under {d}", "which files in {d} end in .{e}?"], "find the {e} files under {d}", "find {d} -name '*.{e}'"),
    (["find files larger than {n} MB in {d}", "which files in {d} are bigger than {n} MB?", "list files over {n} MB under {d}"], "find files in {d} that are bigger than {n} MB", "find {d} -size +{n}M"),
    (["find files in {d} changed in the last {n} days", "which files in {d} changed within {n} days?", "list what changed in {d} in the past {n} days"], "which files in {d} were changed in the last {n} days?", "find {d} -mtime -{n}"),
    (["count the lines in {f}", "how many lines does {f} have?", "number of lines of {f}"], "how many lines are in {f}?", "wc -l {f}"),
    (["show the first {n} lines of {f}", "print the top {n} lines of {f}", "first {n} lines of {f}"], "print the first {n} lines of {f}", "head -n {n} {f}"),
    (["show the last {n} lines of {f}", "print the final {n} lines of {f}", "last {n} lines of {f}"], "print the last {n} lines of {f}", "tail -n {n} {f}"),
    (["follow {f} as it grows", "watch {f} live", "keep showing new lines of {f}"], "watch {f} as it grows", "tail -f {f}"),
    (["search for {w} in {f}", "show the lines of {f} that contain {w}", "find {w} in the file {f}"], "which lines of {f} contain {w}?", "grep {w} {f}"),
    (["search for {w} in all files under {d}", "find {w} anywhere in the folder {d}", "look for {w} in every file of {d}"], "find {w} in all files under {d}", "grep -r {w} {d}"),
    (["count how often {w} appears in {f}", "how many lines of {f} contain {w}?", "count the lines with {w} in {f}"], "count the lines of {f} that contain {w}", "grep -c {w} {f}"),
    (["delete the folder {d}", "remove the directory {d} and all that is in it", "delete {d} with everything in it"], "remove the folder {d}", "rm -r {d}"),
    (["make a folder called {d}", "create the directory {d}", "make a new directory {d}"], "create a folder called {d}", "mkdir -p {d}"),
    (["copy {f} to {d}", "put a copy of {f} into {d}", "copy the file {f} to the folder {d}"], "copy {f} into {d}", "cp {f} {d}/"),
    (["move {f} to {d}", "move the file {f} into the folder {d}", "put {f} into {d} instead"], "move {f} into {d}", "mv {f} {d}/"),
    (["how big is {d}?", "show the disk usage of {d}", "how much space does {d} take?"], "how much disk space does {d} use?", "du -sh {d}"),
    (["pack {d} into a tar.gz archive", "compress the folder {d}", "make a tar.gz of {d}"], "compress {d} into a tar.gz archive", "tar czf {d}.tar.gz {d}"),
    (["which process uses port {p}?", "show what listens on port {p}", "who listens on port {p}?"], "what uses port {p}?", "lsof -i :{p}"),
    (["make {f} executable", "give {f} execute permission", "let {f} be executed"], "make the file {f} executable", "chmod +x {f}"),
    (["sort {f} and drop duplicates", "show the unique lines of {f}, sorted", "sorted lines of {f} without duplicates"], "sort {f} without duplicates", "sort -u {f}"),
    (["select everything from {t}", "show all rows of {t}", "everything in the table {t}"], "select all rows of {t}", "SELECT * FROM {t};"),
    (["count the rows in {t}", "how many {t} are in the table?", "number of rows in {t}"], "how many rows are in {t}?", "SELECT COUNT(*) FROM {t};"),
    (["show the {c} of all {t}", "list the column {c} of {t}", "the {c} of each row of {t}"], "list the {c} of all {t}", "SELECT {c} FROM {t};"),
    (["show {t} where {c} is above {n}", "select the {t} with {c} greater than {n}", "{t} whose {c} is over {n}"], "show the {t} with {c} above {n}", "SELECT * FROM {t} WHERE {c} > {n};"),
    (["show the {n} newest {t}", "list the latest {n} {t}", "the {n} most recent {t}"], "list the {n} newest {t}", "SELECT * FROM {t} ORDER BY created_at DESC LIMIT {n};"),
    (["what is the average {c} of {t}?", "compute the mean {c} in {t}", "average {c} over all {t}"], "compute the average {c} of {t}", "SELECT AVG({c}) FROM {t};"),
    (["what is the highest {c} in {t}?", "find the maximum {c} of {t}", "the largest {c} among {t}"], "what is the maximum {c} of {t}?", "SELECT MAX({c}) FROM {t};"),
    (["count {t} for each {c}", "how many {t} are there per {c}?", "number of {t} by {c}"], "how many {t} are there for each {c}?", "SELECT {c}, COUNT(*) FROM {t} GROUP BY {c};"),
    (["list the different {c} values in {t}", "show the distinct {c} of {t}", "which different {c} values are in {t}?"], "list the distinct {c} values of {t}", "SELECT DISTINCT {c} FROM {t};"),
    (["delete {t} where {c} is below {n}", "remove the {t} with {c} less than {n}", "drop {t} whose {c} is under {n}"], "delete the {t} with {c} below {n}", "DELETE FROM {t} WHERE {c} < {n};"),
    (["sum the {c} of {t}", "add up {c} in {t}", "the total of {c} over {t}"], "add up the {c} of {t}", "SELECT SUM({c}) FROM {t};"),
]  # fmt: skip

PROMPTS = {
    "support": "Classify the support ticket as account, billing, cancel, shipping or technical.\nTicket: {}\nCategory:",
    "legal": "Name the type of the contract clause: confidentiality, governing law, liability, payment or termination.\n"
    "Clause: {}\nType:",
    "code": "Write one shell or SQL command.\nTask: {}\nCommand:",
}

Row = tuple[str, str]


def support_text(template: str, rng: random.Random, held_out: bool) -> str:
    """One ticket: a template with its slots filled, sometimes greeted and thanked."""
    items, days, cities = (NEW_ITEMS, NEW_DAYS, NEW_CITIES) if held_out else (ITEMS, DAYS, CITIES)
    body = template.format(item=rng.choice(items), day=rng.choice(days), city=rng.choice(cities))
    return rng.choice(OPENERS) + body + rng.choice(CLOSERS)


def legal_text(template: str, rng: random.Random, held_out: bool) -> str:
    """One clause with its parties, numbers and states filled in."""
    parties, numbers, states = (NEW_PARTIES, NEW_NUMBERS, NEW_STATES) if held_out else (PARTIES, NUMBERS, STATES)
    party, other = rng.sample(parties, 2)
    text = template.format(
        p=party, P=party[0].upper() + party[1:], p2=other, n=rng.choice(numbers), state=rng.choice(states)
    )
    return text[0].upper() + text[1:]


def classifier_rows(classes: dict[str, list[str]], fill, held_out: bool, count: int, rng: random.Random) -> list[Row]:
    """`count` distinct (text, label) rows from the trained, or the held-out, templates of every class in turn."""
    rows: dict[Row, None] = {}
    labels = sorted(classes)
    for attempt in range(count * 50):
        label = labels[attempt % len(labels)]
        templates = classes[label][-HELD_OUT:] if held_out else classes[label][:-HELD_OUT]
        rows[fill(rng.choice(templates), rng, held_out), label] = None
        if len(rows) == count:
            break
    return list(rows)


def code_rows(held_out: bool, count: int, rng: random.Random) -> list[Row]:
    """`count` distinct task/command rows, the commands in turn; the same slot values go into both."""
    rows: dict[str, Row] = {}
    slots = HELD if held_out else TRAINED
    for attempt in range(count * 50):
        wordings, unseen, command = CODE[attempt % len(CODE)]
        values = {slot: rng.choice(choices) for slot, choices in slots.items()}
        task = (unseen if held_out else rng.choice(wordings)).format(**values)
        rows.setdefault(task, (task, command.format(**values)))
        if len(rows) == count:
            break
    return list(rows.values())


def write(folder: str, name: str, rows: list[Row]) -> None:
    """Write rows as JSON lines, prompts in the adapter's own format, completions with their leading space."""
    path = HERE / folder / name
    lines = [json.dumps({"prompt": PROMPTS[folder].format(text), "completion": f" {answer}"}) for text, answer in rows]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.relative_to(HERE)}: {len(rows)} rows")


def main() -> None:
    """Write all six files."""
    rng = random.Random(SEED)
    for folder, classes, fill in (("support", SUPPORT, support_text), ("legal", LEGAL, legal_text)):
        for name, held_out, count in (("train.jsonl", False, 500), ("heldout.jsonl", True, 100)):
            rows = classifier_rows(classes, fill, held_out, count, rng)
            rng.shuffle(rows)
            write(folder, name, rows)
    for name, held_out, count in (("train.jsonl", False, 1200), ("heldout.jsonl", True, 100)):
        rows = code_rows(held_out, count, rng)
        rng.shuffle(rows)
        write("code", name, rows)


if __name__ == "__main__":
    main()
