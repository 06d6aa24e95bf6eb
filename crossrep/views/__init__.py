"""Reading representation topics: a `LocalView` that follows one, what it answers, and tables read up to an offset."""
