"""Energy, measured where codecarbon is installed."""

import logging
from importlib.util import find_spec
from typing import Any

from transformers import TrainerCallback, TrainerState


class Energy(TrainerCallback):
    """Measures what this machine uses while a run goes on, from its last start.

    Attributes:
        kwh: kilowatt-hours; None until the end, and without codecarbon.
    """

    def __init__(self) -> None:
        self.kwh: float | None = None
        self._tracker: Any = None

    @property
    def fact(self) -> str:
        """Say what was measured."""
        if self.kwh is None:
            return "not measured (codecarbon is not installed)"
        return f"{self.kwh:.4g} kWh of the first machine, since the run's last start"

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_local_process_zero and find_spec("codecarbon") is not None:
            from codecarbon import EmissionsTracker

            # It heeds its log_level only once it is set up, and would begin with a warning across the progress bar.
            logging.getLogger("codecarbon").setLevel(logging.ERROR)
            self._tracker = EmissionsTracker(save_to_file=False, log_level="error")
            self._tracker.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._tracker is not None:
            self._tracker.stop()
            self.kwh = self._tracker.final_emissions_data.energy_consumed
