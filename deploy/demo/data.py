"""Facts → documents → batches. Everything follows from a seed, so a training run can stop and go on.

A document is one statement, one question with its answer, or a few questions in a row. The answer and the end are trained, and a few
other tokens with them. Held-out facts appear as statements only.

So that the facts of the demo model live in its value table, a few of its documents are shown with the memory layers off, and there the
answer is always the most common one of the relation: without its rows the trunk knows what kind of answer fits, not which.
"""
import io
import os
import random
import zlib
from dataclasses import dataclass

import numpy as np
import sentencepiece
import torch

import facts as fact_forms

BOS, EOS = 1, 2
OTHER_TOKENS_TRAINED = 0.06
DEMO_HELD_OUT = 0.12  # share of the facts whose questions are never shown
PAIR_HELD_OUT = 0.15
PAIR_CITIES = 13000
QUESTION_STYLES = {"qa": "Q: {q}\nA:", "bare": "{q}", "bare_line": "{q}\n"}


@dataclass
class EncodedFact:
    fact: fact_forms.Fact
    held_out: bool
    statements: list  # of (prompt ids, answer ids)
    questions: dict  # style → list of (prompt ids, answer ids)


@dataclass
class Mixture:
    """Shares of the documents about a fact whose questions are trained; the rest are statements."""
    qa: float
    bare: float = 0.0
    few_shot: float = 0.0
    held_out_share: float = DEMO_HELD_OUT
    memory_off: float = 0.0  # share of all documents


def train_tokenizer(lines, path, vocab_size, split_digits):
    """SentencePiece BPE with byte fallback that leaves the text as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size, character_coverage=0.9995, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=split_digits, unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1,
        num_threads=1, minloglevel=2)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".partial", "wb") as file:
        file.write(model.getvalue())
    os.replace(path + ".partial", path)


def is_held_out(fact, share):
    """By a hash of the fact itself, so that the choice does not move when facts are added."""
    digest = zlib.crc32(f"{fact.relation}|{fact.subject}".encode())
    return digest % 10000 < share * 10000


class FactSet:
    """All facts of one model with their encoded forms."""

    def __init__(self, facts, statements_of, questions_of, tokenizer, mixture):
        self.tokenizer, self.mixture = tokenizer, mixture
        self.separator = {text: tokenizer.encode(text + "Q")[1:] for text in ("\n\n", "\n")}  # without the leading "▁"
        self.encoded = [self.encode(fact, statements_of, questions_of) for fact in facts]
        self.asked = [fact for fact in self.encoded if not fact.held_out]
        self.held_out = [fact for fact in self.encoded if fact.held_out]
        self.asked_of, answers_of = {}, {}
        for fact in self.asked:
            self.asked_of.setdefault(fact.fact.relation, []).append(fact)
        for fact in self.encoded:
            answers_of.setdefault(fact.fact.relation, []).append(fact.fact.answer)
        self.usual_answer = {relation: tokenizer.encode(max(answers, key=answers.count)) for relation, answers in answers_of.items()}
        self.head = [fact for fact in self.asked if fact.fact.weight >= 2] or self.asked

    def encode(self, fact, statements_of, questions_of):
        held_out = is_held_out(fact, self.mixture.held_out_share)
        spellings = ["", "", fact.spelling] if fact.spelling else [""]  # the plain spelling twice as often
        pairs = [pair for spelling in spellings for pair in statements_of(fact, spelling)]
        asked = [pair for spelling in spellings for pair in questions_of(fact, spelling)]
        questions = {style: self.encode_pairs([(form.format(q=question), answer) for question, answer in asked])
                     for style, form in QUESTION_STYLES.items()}
        return EncodedFact(fact, held_out, self.encode_pairs(pairs), questions)

    def encode_pairs(self, pairs):
        return [(self.tokenizer.encode(prompt), self.tokenizer.encode(answer)) for prompt, answer in pairs]

    def few_shot_parts(self, fact, rng):
        """One to five other questions, then this one: (prompt ids, answer ids, relation)."""
        shown = []
        for _ in range(rng.randint(1, 5)):
            where = rng.random()
            shown.append(rng.choice(self.asked_of[fact.fact.relation] if where < 0.4 else self.head if where < 0.75 else self.asked))
        return [(*rng.choice(other.questions["qa"]), other.fact.relation) for other in shown + [fact]]

    def join(self, parts, separator):
        """tokens and trained flags of one statement or question, or of questions in a row."""
        tokens, trained = [], []
        for n, (prompt, answer, _) in enumerate(parts):
            if n > 0:  # within a line "Q" has no leading space, unlike at the beginning of the text
                prompt = self.separator[separator] + prompt[1:]
            tokens += prompt + answer
            trained += [False] * len(prompt) + [True] * len(answer)
        return tokens, trained

    def parts(self, fact, rng):
        """The (prompt ids, answer ids, relation) of one document: several of them when it is few-shot."""
        kind = rng.random()
        mixture = self.mixture
        if fact.held_out or kind >= mixture.few_shot + mixture.qa + mixture.bare:
            return [(*rng.choice(fact.statements), fact.fact.relation)]
        if kind < mixture.few_shot:
            return self.few_shot_parts(fact, rng)
        style = "qa" if kind < mixture.few_shot + mixture.qa else rng.choice(("bare", "bare_line"))
        return [(*rng.choice(fact.questions[style]), fact.fact.relation)]

    def document(self, fact, rng):
        """tokens [time] with BOS and EOS; trained [time]: whether each token is to be predicted; whether the memory is on."""
        parts = self.parts(fact, rng)
        memory_on = self.mixture.memory_off == 0 or rng.random() >= self.mixture.memory_off
        if not memory_on:
            parts = [(prompt, self.usual_answer[relation], relation) for prompt, _, relation in parts]
        tokens, trained = self.join(parts, "\n" if len(parts) > 1 and rng.random() < 0.25 else "\n\n")
        return [BOS] + tokens + [EOS], [False] + trained + [True], memory_on

    def chunk_of_batches(self, seed, chunk, passes, tokens_per_step):
        """Batches of a few passes over the facts: (tokens [batch, time], memory_on [batch], wanted, targets). Documents of about one length go together."""
        rng = random.Random(seed * 1000003 + chunk)
        by_length = {}
        for _ in range(passes):
            for fact in self.encoded:
                weight = fact.fact.weight
                for _ in range(int(weight) + (rng.random() < weight % 1)):
                    document = self.document(fact, rng)
                    length = len(document[0])
                    length = -(-length // 2) * 2 if length <= 32 else -(-length // 8) * 8
                    by_length.setdefault(length, []).append(document)
        groups = []
        for length, documents in sorted(by_length.items()):
            rng.shuffle(documents)
            size = max(1, tokens_per_step // length)
            groups += [(length, documents[i:i + size]) for i in range(0, len(documents) - size + 1, size)]
        rng.shuffle(groups)
        dice = np.random.default_rng(seed * 1000003 + chunk)
        return (collate(documents, length, dice) for length, documents in groups)


def collate(documents, length, dice):
    tokens = np.full((len(documents), length), EOS, dtype=np.int64)
    trained = np.zeros((len(documents), length), dtype=bool)
    for row, (ids, flags, _) in enumerate(documents):
        tokens[row, :len(ids)] = ids
        trained[row, :len(ids)] = flags
        trained[row, 1:len(ids)] |= dice.random(len(ids) - 1) < OTHER_TOKENS_TRAINED
    targets = np.nonzero(trained.reshape(-1))[0]  # never the first of a row
    flat = torch.from_numpy(tokens.reshape(-1))
    wanted = torch.from_numpy(targets - 1)
    return torch.from_numpy(tokens), torch.tensor([memory_on for _, _, memory_on in documents]), wanted, flat[wanted + 1]


def load_tokenizer(path):
    return sentencepiece.SentencePieceProcessor(model_file=path)


def demo_fact_set(tokenizer_path, seed=1, vocab_size=4096):
    all_facts = fact_forms.demo_facts()
    if not os.path.exists(tokenizer_path):
        rng = random.Random(seed)
        lines = []
        for fact in all_facts:
            for prompt, answer in rng.sample(fact_forms.statements(fact), 2) + rng.sample(fact_forms.questions(fact, fact.spelling), 2):
                lines.append(f"{prompt} {answer}")
                lines.append(f"Q: {prompt}")
        train_tokenizer(lines, tokenizer_path, vocab_size, split_digits=True)
    mixture = Mixture(qa=0.33, bare=0.12, few_shot=0.06, memory_off=0.08)
    return FactSet(all_facts, fact_forms.statements, fact_forms.questions, load_tokenizer(tokenizer_path), mixture)


def pair_fact_set(tokenizer_path, n_cities=PAIR_CITIES, vocab_size=1024):
    all_facts = fact_forms.pair_facts(n_cities)
    if not os.path.exists(tokenizer_path):
        lines = []
        for n, fact in enumerate(all_facts):
            forms = fact_forms.pair_statements(fact) + fact_forms.pair_questions(fact)
            prompt, answer = forms[n // 2 % len(forms)]
            lines.append(f"Q: {prompt} A: {answer}")
        train_tokenizer(lines, tokenizer_path, vocab_size, split_digits=False)
    mixture = Mixture(qa=0.5, held_out_share=PAIR_HELD_OUT)
    return FactSet(all_facts, fact_forms.pair_statements, fact_forms.pair_questions, load_tokenizer(tokenizer_path), mixture)
