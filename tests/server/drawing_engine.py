"""Engines for tests: made from a run, run to the end, their events by picture."""

from smalti.serving.loading import load_engine
from smalti.serving.messages import Draw, Failed, Finished
from smalti.serving.model_settings import ModelSettings


class DrawingEngine:
    """An engine and what it has told."""

    def __init__(self, run, **settings):
        self.told = []
        self.engine = load_engine(ModelSettings(name="digits", run=str(run), **settings), self.told.append)

    def events(self, number):
        return [event for event in self.told if event.number == number]

    def run(self, ticks=10**6):
        while not self.engine.idle and ticks:
            self.engine.tick()
            ticks -= 1

    def draw(self, *orders, first=0, resume=None):
        """All of them together; gives each one's end."""
        for number, order in enumerate(orders, first):
            self.engine.draw(Draw(number, order, 0, resume))
        self.run()
        ends = [self.events(number)[-1] for number in range(first, first + len(orders))]
        assert all(isinstance(end, Finished | Failed) for end in ends)
        self.told.clear()
        return ends
