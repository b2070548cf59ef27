#!/bin/sh
# One's own photos, of which few are labelled: a classifier with certificates.
#
#   sh examples/few_labels.sh photos
#
# photos/train/CLASS/ has the labelled images, photos/unlabeled/ all others, and photos/test/CLASS/ those that test it.
set -e
photos=$1
rush init mine.toml --data "$photos"   # sizes, splits and batches that fit the images
rush run mine.toml --quick             # every stage in minutes, to see that it works; its figures mean nothing
rush cost mine.toml                    # how long the whole takes here
echo "rush run mine.toml               # then everything, to runs/mine/report.html"
rush predict runs/mine-quick "$photos/unlabeled" | head -n 5
