"""Fit classification.yaml for a few steps under each overlay that the command line names, in turn."""

import os
import sys

from pellm_lightning.cli.main import main

examples, *names = sys.argv[1:]
for name in names:
    root = f"runs/overlays/{name}"
    sys.argv = [
        *("pellm_lightning", "fit"),
        *("--config", f"{examples}/classification.yaml", "--config", f"{examples}/aggregation/{name}.yaml"),
        *(f"--trainer.default_root_dir={root}", f"--trainer.logger.init_args.save_dir={root}"),
        *("--trainer.max_epochs=4", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
        f"--data.num_parties={os.environ['WORLD_SIZE']}",
    ]
    main()
