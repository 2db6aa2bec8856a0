"Functions that measure pictures, for several test files"
from matplotlib import pyplot as plt

def texts_of_figure():
    "All that is written in the current figure"
    return ' '.join(t.get_text() for t in plt.gcf().findobj(plt.Text))
