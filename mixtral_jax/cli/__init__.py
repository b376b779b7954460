"""The command line, one file a verb. Heavy imports are inside the verbs, so that --help is quick."""
