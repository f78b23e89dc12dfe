"""Damage to a model directory, of every kind that disks, networks and editors do: `(name, function of the folder)`."""

import json
import random

#: Places in a weights file, as shares of its header and of its data, whose byte is flipped.
PLACES = [i / 24 for i in range(24)]


def damages(folder):
    """Every damage that `folder` can take, each on an undamaged copy of it."""
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    for shard in shards:
        size = (folder / shard).stat().st_size
        header = 8 + int.from_bytes((folder / shard).read_bytes()[:8], "little")
        for share in PLACES:
            yield f"{shard}: header byte at {share:.2f}", flip(shard, int(share * header))
            yield f"{shard}: data byte at {share:.2f}", flip(shard, header + int(share * (size - header)))
        for share in PLACES[:: len(PLACES) // 6]:
            yield f"{shard}: cut at {share:.2f}", cut(shard, int(share * size))
        yield f"{shard}: zeros from the middle", zeros(shard, (header + size) // 2, 64)
        yield f"{shard}: longer", lambda folder, shard=shard: append(folder / shard, b"\0" * 8)
        yield f"{shard}: gone", lambda folder, shard=shard: (folder / shard).unlink()
        yield f"{shard}: empty", cut(shard, 0)
    for i in range(len(shards) - 1):
        yield f"{shards[i]} and the next are swapped", swap(shards[i], shards[i + 1])
        yield f"{shards[i]} is a copy of the next", copy(shards[i + 1], shards[i])
    if len(shards) > 1:
        yield "index: gone", lambda folder: (folder / "model.safetensors.index.json").unlink()
        yield "index: a tensor in another shard", edit("model.safetensors.index.json", move)
        yield "index: without a tensor", edit("model.safetensors.index.json", lambda t: t["weight_map"].popitem())
    yield "another weights file", lambda folder: (folder / "model-extra.safetensors").write_bytes(b"\0" * 16)
    yield "config: gone", lambda folder: (folder / "config.json").unlink()
    yield "config: cut", cut("config.json", 40)
    for key in ("quantization_config", "quantization"):
        table = json.loads((folder / "config.json").read_text()).get(key)
        if table:
            yield f"config: without {key}", edit("config.json", lambda t, key=key: t.pop(key))
            yield f"config: {key} says more", edit("config.json", lambda t, key=key: t[key].update(rotation=1))
            yield f"config: {key} is a list", edit("config.json", lambda t, key=key: t.update({key: [t[key]]}))
            yield f"config: {key} has other bits", edit("config.json", lambda t, key=key: other_bits(t[key]))
    yield "seal: cut", cut("qkit.json", 60)
    yield "seal: empty object", lambda folder: (folder / "qkit.json").write_text("{}")
    yield "seal: a list", lambda folder: (folder / "qkit.json").write_text("[]")
    yield "seal: says more", edit("qkit.json", lambda t: t.update(note="mine"))
    for key in ("files", "headers", "tensors"):
        yield f"seal: without {key}", edit("qkit.json", lambda t, key=key: t.pop(key))
    for share in PLACES[::3]:
        yield (
            f"seal: another digest at {share:.2f}",
            edit("qkit.json", lambda t, share=share: redigest(t["tensors"], share)),
        )
        yield (
            f"seal: without the tensor at {share:.2f}",
            edit("qkit.json", lambda t, share=share: drop(t["tensors"], share)),
        )
    yield "seal: another header", edit("qkit.json", lambda t: redigest(t["headers"], 0))
    yield "seal: a file too many", edit("qkit.json", lambda t: t["files"].append("gone.json"))
    yield (
        "seal: a digest that is a number",
        edit("qkit.json", lambda t: t["tensors"].update({next(iter(t["tensors"])): 7})),
    )


def flip(name, place):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 1 << random.Random(place).randrange(8)
        (folder / name).write_bytes(data)

    return damage


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def zeros(name, place, count):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[place : place + count] = bytes(count)
        (folder / name).write_bytes(data)

    return damage


def append(file, data):
    file.write_bytes(file.read_bytes() + data)


def swap(one, other):
    def damage(folder):
        first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
        (folder / one).write_bytes(second)
        (folder / other).write_bytes(first)

    return damage


def copy(source, target):
    return lambda folder: (folder / target).write_bytes((folder / source).read_bytes())


def edit(name, change):
    def damage(folder):
        table = json.loads((folder / name).read_text())
        change(table)
        (folder / name).write_text(json.dumps(table))

    return damage


def move(table):
    places = table["weight_map"]
    name = min(places)
    places[name] = max(set(places.values()) - {places[name]})


def other_bits(table):
    table.update(bits=5)
    for group in table.get("config_groups", {}).values():
        group["weights"]["num_bits"] = 5


def redigest(table, share):
    name = sorted(table)[int(share * len(table))]
    table[name] = "0" * 64


def drop(table, share):
    table.pop(sorted(table)[int(share * len(table))])
