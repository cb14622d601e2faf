"""The command line of pyreft: parse, call the library, print. Heavy imports wait until a command runs."""
