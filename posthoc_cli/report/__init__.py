"""Results for people: facts as texts, and the HTML page of a sweep."""
