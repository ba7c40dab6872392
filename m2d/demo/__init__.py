"""Images for the demo and the tests, drawn here: no download, no patient."""
