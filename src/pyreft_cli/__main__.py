"""`python -m pyreft_cli`."""

from .app import main

main()
