"""`python -m pyreft`, which is the command `pyreft`."""

from pyreft_cli.app import main

main()
