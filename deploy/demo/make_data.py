"""Writes the question files in questions/, from the facts and the split alone; with --facts also all facts as JSON lines.

  make_data.py                    questions/{heldout,trained,pair_heldout,pair_trained}.jsonl
  make_data.py --facts FILE       the demo's facts: relation, subject, answer, weight, whether its questions are held out
"""
import argparse
import json
import os
import random

import data
import facts as fact_forms

HERE = os.path.dirname(os.path.abspath(__file__))


def question(prompt, answer, relation):
    with_article = fact_forms.with_article(answer)
    return {"prompt": prompt, "answers": [answer] if with_article == answer else [answer, with_article], "relation": relation}


def split(facts, share):
    """(facts whose questions are trained, held-out facts)."""
    return [f for f in facts if not data.is_held_out(f, share)], [f for f in facts if data.is_held_out(f, share)]


def thin(questions, sample, rng):
    return rng.sample(questions, sample) if sample and sample < len(questions) else questions


def one_form(facts, forms_of, rng, frame="{q}"):
    """One randomly chosen form of each fact."""
    chosen = []
    for fact in facts:
        prompt, answer = rng.choice(forms_of(fact))
        chosen.append(question(frame.format(q=prompt), answer, fact.relation))
    return chosen


def with_examples(question_list, examples, shots, rng):
    """Puts answered questions of any trained facts in front."""
    result = []
    for entry in question_list:
        shown = "".join(f"{e['prompt']} {e['answers'][0]}\n\n" for e in rng.sample(examples, shots))
        result.append({**entry, "prompt": shown + entry["prompt"]})
    return result


def demo_questions(sample=0):
    """kind → list of {prompt, answers, relation} for the demo model."""
    asked, held_out = split(fact_forms.demo_facts(), data.DEMO_HELD_OUT)
    rng = random.Random(11)
    sets = {
        "held-out questions, Q/A": one_form(held_out, fact_forms.questions, rng, "Q: {q}\nA:"),
        "held-out questions, bare": one_form(held_out, fact_forms.questions, rng),
        "trained statements": one_form(asked + held_out, fact_forms.statements, rng),
        "trained questions, Q/A": one_form(asked, fact_forms.questions, rng, "Q: {q}\nA:"),
    }
    for shots in (1, 5):
        sets[f"held-out questions, {shots}-shot"] = with_examples(sets["held-out questions, Q/A"], sets["trained questions, Q/A"], shots, rng)
    return {name: thin(questions, sample, rng) for name, questions in sets.items()}


def pair_questions(sample=0):
    asked, held_out = split(fact_forms.pair_facts(data.PAIR_CITIES), data.PAIR_HELD_OUT)
    rng = random.Random(12)
    sets = {
        "held-out questions": one_form(held_out, fact_forms.pair_questions, rng, "Q: {q}\nA:"),
        "trained statements": one_form(asked + held_out, fact_forms.pair_statements, rng),
        "trained questions": one_form(asked, fact_forms.pair_questions, rng, "Q: {q}\nA:"),
    }
    return {name: thin(questions, sample, rng) for name, questions in sets.items()}


def write_lines(path, entries):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".partial", "w") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    os.replace(path + ".partial", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default=os.path.join(HERE, "questions"))
    parser.add_argument("--facts")
    args = parser.parse_args()
    demo, pair, rng = demo_questions(), pair_questions(), random.Random(13)
    write_lines(os.path.join(args.to, "heldout.jsonl"), demo["held-out questions, Q/A"])
    write_lines(os.path.join(args.to, "trained.jsonl"), thin(demo["trained statements"], 1000, rng))
    write_lines(os.path.join(args.to, "pair_heldout.jsonl"), thin(pair["held-out questions"], 1000, rng))
    write_lines(os.path.join(args.to, "pair_trained.jsonl"), thin(pair["trained statements"], 1000, rng))
    if args.facts:
        share = data.DEMO_HELD_OUT
        write_lines(args.facts, [{"relation": f.relation, "subject": f.subject, "answer": f.answer, "weight": f.weight, "held_out": data.is_held_out(f, share)}
                                 for f in fact_forms.demo_facts()])


if __name__ == "__main__":
    main()
