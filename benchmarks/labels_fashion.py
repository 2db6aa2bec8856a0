"""Show the ten largest losses of `baseColour` on `fashion`: run README's plain call with mobilenet_v2, then write a
table, a picture of the ten items and a page to correct them.

Usage: python -m benchmarks.labels_fashion [--seed 0] [--n 800] [--out demo/labels_fashion]"""
import argparse
from pathlib import Path
import matplotlib
import pandas as pd

from fastai_multi import *
from benchmarks.defaults import trained

OUTPUT = 'baseColour'

def top_ten(learn, k=10):
    "The items with the largest loss of `baseColour`: their file, title, label, answer with its probability, and loss"
    interp = MultiInterpretation.from_learner(learn)
    losses,places = interp.top_losses(k, output=OUTPUT)
    rows = interp.items.iloc[[int(i) for i in places]]
    said = learn.predict_df(rows, with_probs=True)
    table = pd.DataFrame(dict(file=rows.file, title=rows.title, label=rows[OUTPUT], answer=said[OUTPUT],
                              probability=said[f'{OUTPUT}_confidence'].round(2), loss=losses.numpy().round(2)))
    return interp, places, table

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--n', type=int, default=None)
    parser.add_argument('--out', type=Path, default=Path('demo/labels_fashion'))
    args = parser.parse_args()
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    learn = trained('fashion', args.seed, n=args.n)
    print(pd.Series(learn.evaluate()))
    interp,places,table = top_ten(learn)
    with pd.option_context('display.max_colwidth', 60, 'display.width', 200): print(table.to_string())
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out/'top_ten.csv')
    interp.show(places, ncols=5, figsize=(20, 13))
    plt.savefig(args.out/'top_ten.png', dpi=80)
    print(review_page(interp, args.out/'review.html', OUTPUT, k=10))

if __name__ == '__main__': main()
