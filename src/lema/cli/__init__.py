"""The command line, one verb a file. It knows words and screens; what they ask for is done by the rooms below."""
