"""How Ray Train gets a run's rows to its workers: a feed, split among as many workers as there are this time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ray.train import DataConfig

from app.data.feed import Feed
from app.training.checkpoint_store import CheckpointStore

if TYPE_CHECKING:
    from app.data.batches import Batch


class FeedConfig(DataConfig):
    """Called by Ray Train each time that it starts a worker group: begins at the checkpoint that the group finds."""

    name = "train"

    def __init__(self, feed: Feed, *, checkpoints: CheckpointStore, is_elastic: bool) -> None:
        super().__init__()
        self.feed = feed
        self.checkpoints = checkpoints
        self.is_elastic = is_elastic

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **options: Any) -> list[dict[str, Any]]:
        dataset = self.feed.dataset(
            start_step=self.checkpoints.latest_step(),
            workers=world_size,
            # An elastic worker group takes every CPU that there is; reading must not wait for one.
            reading_cpus=0 if self.is_elastic else 1,
        )
        # Each packet is one row and goes to the worker with the fewest so far: of every window, each worker gets one.
        return [{self.name: split} for split in dataset.streaming_split(world_size, equal=True)]


def worker_batches(feed: Feed, *, start_step: int) -> Iterator["Batch"]:
    """This worker's rows of every step from `start_step` (from 0) on."""
    import ray.train

    from app.training.workers import world_size

    expected = start_step
    packets = ray.train.get_dataset_shard(FeedConfig.name).iter_batches(batch_size=None, batch_format="pyarrow")
    for packet in packets:
        first, num_steps = packet["first_step"][0].as_py(), packet["num_steps"][0].as_py()
        assert packet.num_rows == 1 and first == expected, f"the packet of step {first} came in place of {expected}'s"
        yield from feed.batches(packet, workers=world_size())
        expected += num_steps
