"""`nearkin compare`: objectives trained on equal terms, and whether their differences are more than chance."""
