"""Verbs that the demonstration adds to `lema`. torch and transformers are imported when one of them runs."""
