"""Does SupCon help on these images? Equal terms, one seed each to try it; a verdict needs three."""

from tempfile import TemporaryDirectory

import nearkin

if __name__ == "__main__":
    options = {"model": "test_resnet", "images_per_class": 60, "epochs": 4}
    with TemporaryDirectory() as place:
        found = nearkin.compare(
            "digits", "ce,supcon", seeds=1, jobs=1, out=f"{place}/comparison", **options
        )
    for row in found.table():
        print(f"{row['entry']}: test top-1 {row['top1']:.3f}")  # noqa: T201
    print(found.verdict("supcon"))  # noqa: T201
