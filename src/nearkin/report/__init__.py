"""Pages for people: one HTML file without scripts, with pictures drawn as SVG. Takes plain values only."""
