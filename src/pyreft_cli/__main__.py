"""`python -m pyreft_cli`."""

from pyreft_cli.app import main

main()
