"""The laboratory: data, models, training runs, studies and reports around the library."""
