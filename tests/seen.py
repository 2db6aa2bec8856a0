"Functions for several test files that read figures"
from matplotlib import pyplot as plt

def texts_of_figure():
    "All texts of the current figure"
    return ' '.join(t.get_text() for t in plt.gcf().findobj(plt.Text))
