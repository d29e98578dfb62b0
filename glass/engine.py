"""The one thread that owns the models: it makes the tokens of all requests, and runs other jobs.

serve.py tells it what to do, and hears of every token. See glass/batch.py for the rows of a model.
"""

import threading
import traceback
from collections import deque
from concurrent.futures import Future

from glass.batch import Failed


class Engine:
    """The thread that owns the models: it runs jobs between steps, and steps while rows are there.

    deliver: called on this thread with lists of (row, event). log: called with a line about a
    failure.
    """

    def __init__(self, deliver, log):
        self.deliver, self.log = deliver, log
        self.batches, self.jobs, self.ending = [], deque(), False
        self.condition = threading.Condition()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def call(self, work):
        """Run work() on the engine's thread, between two steps -> a Future of its result."""
        future = Future()
        with self.condition:
            self.jobs.append((work, future))
            self.condition.notify()
        return future

    def submit(self, batch, rows):
        """Let rows wait for their turn in a batch."""

        def add():
            if batch not in self.batches:
                self.batches.append(batch)
            batch.waiting.extend(rows)

        return self.call(add)

    def forget(self, batch):
        """Let go of the batch of a model that is not needed any more."""
        return self.call(lambda: batch in self.batches and self.batches.remove(batch))

    def fail_waiting(self, reason):
        """End the rows that wait; those that have begun go on."""

        def fail():
            for batch in self.batches:
                waiting, batch.waiting = batch.waiting, deque()
                self.deliver([(row, Failed(reason)) for row in waiting])

        return self.call(fail)

    def fail_all(self, reason):
        """End all rows."""
        return self.call(lambda: [self.deliver(batch.fail(reason)) for batch in self.batches])

    def close(self):
        """End the thread, after the round that it is in."""
        with self.condition:
            self.ending = True
            self.condition.notify()
        self.thread.join()

    def run(self):
        while True:
            with self.condition:
                self.condition.wait_for(self.has_something)
                jobs, self.jobs = self.jobs, deque()
            for work, future in jobs:
                run_job(work, future)
            if self.ending:
                return
            for batch in self.batches:
                self.advance(batch)

    def has_something(self):
        return self.ending or self.jobs or any(batch.has_work for batch in self.batches)

    def advance(self, batch):
        """Deliver what batch.advance gives; where that fails, its rows end and others go on."""
        try:
            for events in batch.advance():
                self.deliver(events)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.log(f"a step failed: {type(error).__name__} at {place.filename}:{place.lineno}")
            reason = f"the model failed ({type(error).__name__}): ask for less, or ask again"
            self.deliver(batch.fail(reason))


def run_job(work, future):
    """Put what work() gives or raises into the future, unless nobody waits for it any more."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
