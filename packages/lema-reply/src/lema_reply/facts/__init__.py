"""Tables made by hand: things that no data package has, each with its source named beside it."""
