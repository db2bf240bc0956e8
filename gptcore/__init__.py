"""gptcore: a GPT you can read in an afternoon, train on the machine you have, and look inside."""
