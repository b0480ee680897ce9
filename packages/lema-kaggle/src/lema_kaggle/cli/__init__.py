"""What Kaggle adds to `lema`: one verb with several below it."""
