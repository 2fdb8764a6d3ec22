#!/usr/bin/env python3
"""Holds our tokenizers against the packages tokenizers, tiktoken and sentencepiece on the same generated lines.

Tokenizers are trained here, one for each family's way of splitting text, from text made here; nothing is downloaded. Every line
must encode to the same ids, and every sequence of ids decode to the same text. Without the packages it says so and passes:

    python3 -m venv venv && venv/bin/pip install tokenizers tiktoken sentencepiece==0.1.99
    venv/bin/python tests/tokenizer_parity.py --tool build/tests/memserve-tokenizer --lines 100000
    venv/bin/python tests/tokenizer_parity.py --tool build/tests/memserve-tokenizer --speed
    venv/bin/python tests/tokenizer_parity.py --fixture tests/engine/tokenizer/parity    # writes the small committed cases

--tokenizer_json FILE takes a real one too. sentencepiece 0.1.99 is the oldest wheel for Python 3.11 and encodes as Debian's library
(0.1.97) does; later ones break ties between equally good Unigram encodings in another way.
"""

import argparse
import base64
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>"]
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]

WORDS = """the of and to in a is that for it was on are as with his they at be this from have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these would other into
has more her two like him see time could no make than first been its who now people my made over did down only way find use may
water long little very after words called just where most know function return import class def while else harbour keeper bells
memory strange store tide boats rhythm internationalisation antidisestablishmentarianism""".split()
SCRIPTS = {
    "latin": "abcdefghijklmnopqrstuvwxyzàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿœšžßłđğışőű",
    "greek": "αβγδεζηθικλμνξοπρστυφχψωάέήίόύώ",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъыьэюяёіїєґ",
    "hebrew": "אבגדהוזחטיכלמנסעפצקרשת",
    "arabic": "ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءآأؤإئًٌٍَُِّْ",
    "devanagari": "अआइईउऊएऐओऔकखगघचछजझटठडढणतथदधनपफबभमयरलवशषसहािीुूेैोौ्ंः",
    "thai": "กขคงจฉชซญฎฏฐณดตถทธนบปผฝพฟภมยรลวศษสหอฮะาิีึืุูเแโใไ่้๊๋",
    "han": "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长",
    "kana": "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをんアイウエオカキクケコサシスセソガギグパピプ",
    "hangul": "가나다라마바사아자차카타파하각난닫랄맘법성일이은는을를의에서와과도한국어문장",
    "emoji": "😀😁😂🤣😊😍🤔👍🏽👩‍💻🏳️‍🌈🇩🇪❤️🔥✨🚀☃️",
    "math": "∀∂∈ℝ∧∪≡∞↑→↓∑∏√±×÷≤≥≠½¼²³⁴①②Ⅳ٣४",
    "combining": "e\u0301a\u0308o\u0302n\u0303i\u0327ｱｶﾞﾊﾟﬁﬂÅΩK",
}
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u2003", "\u3000", "\u200b", "\u0085", "\u180e", "\u2028", "\v", "\f"]
PUNCTUATION = list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["...", "—", "…", "«", "»", "“", "”", "、", "。", "！", "'s", "'LL", "'re", "'ſ", "://", "->", "==", "▁", "▁▁"]


def make_line(rng, specials=True, runs=True):
    """One line of mixed text; no two kinds of trouble are ever far apart. Long runs of one character would be most of the bytes:
    `runs` says whether there are any."""
    out = []
    scripts = rng.sample(list(SCRIPTS), 3)
    for _ in range(rng.randint(1, 24)):
        kind = rng.random()
        if kind < 0.40:
            word = rng.choice(WORDS)
            out.append(rng.choice([word, word.capitalize(), word.upper()]) if rng.random() < 0.3 else word)
            out.append(" ")
        elif kind < 0.60:
            letters = SCRIPTS[rng.choice(scripts)]
            out.append("".join(rng.choice(letters) for _ in range(rng.randint(1, 9))))
            out.append(rng.choice(["", " "]))
        elif kind < 0.70:
            out.append(str(rng.randint(0, 10 ** rng.randint(1, 12))))
        elif kind < 0.82:
            out.append(rng.choice(PUNCTUATION))
        elif kind < 0.92:
            out.append(rng.choice(SPACES) * rng.choice([1, 1, 1, 2, 7]))
        elif kind < 0.96 and not runs:
            out.append("\n")
        elif kind < 0.94:
            out.append(" " * rng.randint(1, 300))
        elif kind < 0.96:
            out.append(rng.choice("aA=-.0é東🙂") * rng.randint(1, 200))
        elif kind < 0.98 and specials:
            out.append(rng.choice(SPECIALS + ["<|im_", "|>", "<|reserved_special_token_7|>", "<0x41>"]))
        else:  # any assigned character of the planes in use
            code = rng.choice([rng.randint(0x21, 0x2FFF), rng.randint(0x3000, 0x9FFF), rng.randint(0x1F300, 0x1F5FF)])
            character = chr(code)
            out.append(character if stable(character) else "?")
    return "".join(out)


def stable(character):
    """Whether old Unicode tables know it: the libraries differ in which version they follow."""
    import unicodedata

    return unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs", "Co")


def plain_texts(seed, count):
    rng = random.Random(seed)
    return [make_line(rng, specials=False) for _ in range(count)]


# --- tokenizers of each family, small


def family(name, texts, vocab):
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    byte_level = dict(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = SPECIALS[:3]
    if name in ("llama2", "mistral"):
        if name == "llama2":
            normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            splitter = None
        else:
            normalizer = None
            splitter = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
        trained = Tokenizer(models.BPE())
        if normalizer:
            trained.normalizer = normalizer
        trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
        trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, show_progress=False, limit_alphabet=300))
        model = json.loads(trained.to_str())["model"]
        tokens = ["<unk>", "<s>", "</s>"] + BYTE_PIECES
        known = set(tokens)
        tokens += [token for token in model["vocab"] if token not in known]
        merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
        tokenizer = Tokenizer(
            models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        )
        if normalizer:
            tokenizer.normalizer = normalizer
        if splitter:
            tokenizer.pre_tokenizer = splitter
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return tokenizer

    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if name == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif name == "gpt2_prefix":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif name == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
        )
    elif name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
        )
    elif name == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name.startswith("split_"):  # every behaviour, on punctuation
        behavior, invert = {
            "split_removed": ("removed", False),
            "split_previous": ("merged_with_previous", False),
            "split_next": ("merged_with_next", False),
            "split_contiguous": ("contiguous", True),
        }[name]
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\d+"), "#")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"[^\s\p{L}\p{N}]"), behavior, invert=invert), pre_tokenizers.ByteLevel(**byte_level)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, special_tokens=specials, show_progress=False)
    )
    tokenizer.add_tokens(
        [
            AddedToken("<think>", normalized=False),
            AddedToken("=>", single_word=True),
            AddedToken("harbour", lstrip=True),
            AddedToken("[MASK]", rstrip=True, normalized=False),
        ]
    )
    return tokenizer


FAMILIES = [
    "gpt2", "gpt2_prefix", "llama3", "qwen2", "smollm2", "llama2", "mistral",
    "split_removed", "split_previous", "split_next", "split_contiguous",
]  # fmt: skip


class HuggingFace:
    kind = "bpe"

    def __init__(self, name, tokenizer, folder):
        self.name, self.tokenizer, self.path = name, tokenizer, folder / f"{name}.json"
        tokenizer.save(str(self.path), pretty=False)
        self.byte_fallback = '"ByteFallback"' in self.path.read_text()

    def encode(self, texts, special):
        self.tokenizer.encode_special_tokens = not special
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids, special):
        return self.tokenizer.decode(ids, skip_special_tokens=not special)

    def vocab_size(self):
        return self.tokenizer.get_vocab_size()

    def comparable(self, ids):
        """A run of byte tokens that is not all UTF-8: this package gives up the whole run, and the text of a stream would change
        after it was sent; we follow the sentencepiece library instead, which gives up single bytes."""
        if not self.byte_fallback:
            return True
        run = b""
        for id in ids + [0]:
            token = self.tokenizer.id_to_token(id)
            if token.startswith("<0x") and len(token) == 6:
                run += bytes([int(token[3:5], 16)])
                continue
            if run:
                try:
                    run.decode()
                except UnicodeDecodeError:
                    return False
            run = b""
        return True


class Tiktoken:
    kind = "tiktoken"

    def __init__(self, texts, vocab, folder):
        import tiktoken

        trained = family("llama3", texts, vocab)
        alphabet = {}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        for byte in printable:
            alphabet[chr(byte)] = byte
        for i, byte in enumerate(others):
            alphabet[chr(256 + i)] = byte
        merged = [
            bytes(alphabet[c] for c in token)
            for token, _ in sorted(json.loads(trained.to_str())["model"]["vocab"].items(), key=lambda item: item[1])
            if token not in SPECIALS
        ]
        ranks = [bytes([byte]) for byte in range(256)] + [token for token in merged if len(token) > 1]
        self.name, self.path = "tiktoken", folder / "tiktoken.model"
        self.path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))
        names = ["<|begin_of_text|>", "<|end_of_text|>"] + [f"<|reserved_special_token_{i}|>" for i in range(4)]
        names += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
        names += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
        self.encoding = tiktoken.Encoding(
            "local",
            pat_str=LLAMA3,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens={name: len(ranks) + i for i, name in enumerate(names)},
        )
        self.ranks = len(ranks)

    def encode(self, texts, special):
        if special:
            return [self.encoding.encode(text, allowed_special="all") for text in texts]
        return [self.encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids, special):
        return self.encoding.decode([id for id in ids if special or id < self.ranks])

    def vocab_size(self):
        return self.ranks + 256

    def comparable(self, ids):
        return True


class SentencePiece:
    kind = "sentencepiece"

    def __init__(self, name, texts, vocab, folder, **options):
        import sentencepiece

        corpus = folder / f"{name}.txt"
        corpus.write_text("\n".join(" ".join(text.split()) for text in texts))
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(folder / name), vocab_size=vocab + 600, minloglevel=2, hard_vocab_limit=False,
            character_coverage=0.98, num_threads=1, max_sentence_length=100000, **options,
        )  # fmt: skip
        self.name, self.path = name, folder / f"{name}.model"
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(self.path))

    def encode(self, texts, special):
        return [self.processor.encode(text) for text in texts]

    def decode(self, ids, special):
        return self.processor.decode(ids)

    def vocab_size(self):
        return self.processor.get_piece_size()

    def comparable(self, ids):
        return True


def make_all(folder, vocab, lines, only=None):
    texts = plain_texts(1, lines)
    for name in FAMILIES:
        if only is None or name in only:
            yield HuggingFace(name, family(name, texts, vocab), folder)
    if only is None or "tiktoken" in only:
        yield Tiktoken(texts, vocab, folder)
    if only is None or "sp_bpe" in only:
        yield SentencePiece(
            "sp_bpe", texts, vocab, folder, model_type="bpe", byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        )  # fmt: skip
    import sentencepiece

    if sentencepiece.__version__ > "0.1.99" and (only is None or "sp_unigram" in only):
        print(f"sp_unigram is left out: sentencepiece {sentencepiece.__version__} breaks ties in another way than Debian's 0.1.97")
    elif only is None or "sp_unigram" in only:
        yield SentencePiece("sp_unigram", texts, vocab, folder, model_type="unigram")


def random_ids(rng, vocab):
    kind = rng.random()
    if kind < 0.5:
        return [rng.randrange(vocab) for _ in range(rng.randint(0, 40))]
    low = min(vocab, 300)  # bytes, and what stands beside them
    return [rng.randrange(low) if rng.random() < 0.9 else rng.randrange(vocab) for _ in range(rng.randint(0, 40))]


class Ours:
    def __init__(self, tool, tokenizer):
        self.command = [tool, tokenizer.kind, str(tokenizer.path)]

    def run(self, arguments, inputs):
        lines = "".join(json.dumps(one) + "\n" for one in inputs)
        done = subprocess.run(self.command + arguments, input=lines.encode(), stdout=subprocess.PIPE, check=True)
        return [json.loads(line) for line in done.stdout.decode().split("\n")[:-1]]


def compare(tool, tokenizer, lines, seed):
    rng = random.Random(seed)
    texts = [make_line(rng) for _ in range(lines)]
    ours = Ours(tool, tokenizer)
    failures = checked = 0

    def report(what, given, theirs, found):
        nonlocal failures
        failures += 1
        if failures <= 3:
            print(f"{tokenizer.name}: {what} of {given!r}\n  theirs {theirs}\n  ours   {found}", file=sys.stderr)

    for special in (False, True):
        if special and tokenizer.kind == "sentencepiece":
            continue
        some = texts if not special else texts[: max(1000, lines // 5)]
        theirs = tokenizer.encode(some, special)
        for text, expected, found in zip(some, theirs, ours.run(["encode"] + ["special"] * special, some)):
            checked += 1
            if expected != found:
                report("encoding", text, expected, found)
    ids = [random_ids(rng, tokenizer.vocab_size()) for _ in range(lines // 4)]
    ids = [one for one in ids if tokenizer.comparable(one)] + theirs[: lines // 4]
    for special in (False, True):
        if special and tokenizer.kind == "sentencepiece":
            continue
        for one, found in zip(ids, ours.run(["decode"] + ["special"] * special, ids)):
            checked += 1
            expected = tokenizer.decode(one, special)
            if expected != found:
                report("decoding", one, repr(expected), repr(found))
    print(f"{tokenizer.name}: {checked} comparisons, {failures} differ")
    return failures


def their_speed(work, size, seconds):
    best = float("inf")
    spent = 0.0
    while spent < seconds:
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
        spent += time.perf_counter() - begin
    return size / best / 1e6


def speed(tool, tokenizer, lines, seconds):
    """The same lines one after the other, one thread each."""
    rng = random.Random(5)
    texts = [make_line(rng, specials=False, runs=False) for _ in range(lines)]
    size = sum(len(text.encode()) for text in texts)
    if tokenizer.kind == "bpe":
        one = tokenizer.tokenizer
        encode = lambda text: one.encode(text, add_special_tokens=False).ids  # noqa: E731
    elif tokenizer.kind == "tiktoken":
        encode = tokenizer.encoding.encode_ordinary
    else:
        encode = tokenizer.processor.encode
    ids = [encode(text) for text in texts]
    theirs_encode = their_speed(lambda: [encode(text) for text in texts], size, seconds)
    theirs_decode = their_speed(lambda: [tokenizer.decode(one, False) for one in ids], size, seconds)
    ours = Ours(tool, tokenizer).run(["speed", str(seconds)], texts)[0]
    print(
        f"{tokenizer.name:12} encode {ours['encode_mb_per_s']:7.2f} MB/s, theirs {theirs_encode:7.2f}, ratio "
        f"{ours['encode_mb_per_s'] / theirs_encode:5.2f};  decode {ours['decode_mb_per_s']:7.2f}, theirs {theirs_decode:7.2f}, "
        f"ratio {ours['decode_mb_per_s'] / theirs_decode:5.2f}"
    )
    return ours["encode_mb_per_s"] < 0.9 * theirs_encode or ours["decode_mb_per_s"] < 0.9 * theirs_decode


def write_fixture(folder, lines):
    """Small vocabularies with what each package makes of some lines: cases for a test that needs no package."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(11)
    texts = [line if len(line) < 400 else line[:400] for line in (make_line(rng) for _ in range(lines))]
    names = [name for name in FAMILIES if name not in ("gpt2_prefix", "split_removed", "split_contiguous")]
    for tokenizer in make_all(folder, 600, 3000, [*names, "tiktoken", "sp_bpe", "sp_unigram"]):
        cases = {"kind": tokenizer.kind, "file": tokenizer.path.name, "encode": [], "encode_special": [], "decode": []}
        some = texts if tokenizer.name in ("gpt2", "llama3", "qwen2", "llama2", "tiktoken", "sp_bpe") else texts[:40]
        cases["encode"] = [[text, ids] for text, ids in zip(some, tokenizer.encode(some, False))]
        if tokenizer.kind != "sentencepiece":
            cases["encode_special"] = [[text, ids] for text, ids in zip(some, tokenizer.encode(some, True)) if "<" in text]
        ids = [one for one in (random_ids(rng, tokenizer.vocab_size()) for _ in range(50)) if tokenizer.comparable(one)]
        cases["decode"] = [[one, tokenizer.decode(one, False)] for one in ids]
        target = folder / f"{tokenizer.name}.cases.json"
        target.write_text(json.dumps(cases, ensure_ascii=True, separators=(",", ":")) + "\n")
        print(target)
    for scrap in [*folder.glob("*.vocab"), *folder.glob("*.txt")]:
        scrap.unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", help="build/tests/memserve-tokenizer")
    parser.add_argument("--lines", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--only", action="append", help="a tokenizer by name; may be repeated")
    parser.add_argument("--tokenizer_json", action="append", default=[], type=pathlib.Path)
    parser.add_argument("--speed", action="store_true", help="compare throughput instead; fails below 0.9 of theirs")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--fixture", type=pathlib.Path)
    arguments = parser.parse_args()
    try:
        import sentencepiece  # noqa: F401
        import tiktoken  # noqa: F401
        import tokenizers
    except ImportError as error:
        print(f"skipped: {error}; see --help for what to install")
        return
    if arguments.fixture:
        write_fixture(arguments.fixture, 80)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        candidates = [*make_all(folder, arguments.vocab, 8000, arguments.only)]
        candidates += [HuggingFace(path.parent.name, tokenizers.Tokenizer.from_file(str(path)), folder) for path in arguments.tokenizer_json]
        if arguments.speed:
            slow = [one.name for one in candidates if speed(arguments.tool, one, min(arguments.lines, 10000), arguments.seconds)]
            sys.exit(f"below 0.9 of theirs: {', '.join(slow)}" if slow else 0)
        failures = sum(compare(arguments.tool, one, arguments.lines, arguments.seed) for one in candidates)
        sys.stdout.flush()
        if failures:
            sys.exit(f"{failures} comparisons differ")


if __name__ == "__main__":
    main()
