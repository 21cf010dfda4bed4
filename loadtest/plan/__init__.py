"""What will be asked and what is required: scenarios, requirements, and the tape that is made from them."""
