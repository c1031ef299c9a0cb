"""Pages for people: each one HTML file that needs nothing else, with pictures drawn as SVG. Takes plain values only."""
