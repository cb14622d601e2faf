"""An adapter's directory, and a checkpoint of the original's: what their files mean."""
