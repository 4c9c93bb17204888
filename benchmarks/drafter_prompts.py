"""The prompts that the shipped drafter was made with: of public sets, with none of Spec-Bench's.

* openai/grade-school-math @ 3101c7d, `data/train.jsonl`, MIT;
* yizhongw/self-instruct @ 0b26cca, Apache-2.0: `data/seed_tasks.jsonl`, which people wrote,
  `human_eval/user_oriented_instructions.jsonl`, and of `data/finetuning/t0_train_50k`, which is
  taken from T0's training data, in all its templates, CNN/DailyMail (Apache-2.0), CommonGen,
  CommonsenseQA, DuoRC and Gigaword (MIT), Quoref, ROPES, CosmosQA and QASC (CC BY 4.0);
* sentences of our own: tasks over subjects, and German to translate.

What has 8 words in a row with a Spec-Bench prompt is left out. The order is shuffled, so that any
beginning is a fair sample.

Run: python benchmarks/drafter_prompts.py GRADE_SCHOOL_MATH SELF_INSTRUCT > prompts.jsonl, with the
repositories' folders (or bare git directories)
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spec_bench import FILE

from smartspec.lab.distill.answers import unlike
from smartspec.lab.public_data import data_folder

T0 = "data/finetuning/t0_train_50k/data_per_template"
SETS = (
    *("cnn_dailymail", "common_gen", "commonsense_qa", "cosmos_qa", "duorc", "gigaword"),
    *("qasc", "quoref", "ropes"),
)
MAX_CHARACTERS = 2000
MAX_PASSAGE = 1500  #: characters of an article or passage


def _listed(text: str) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).split(", "))


TASKS = (
    "Write a short blog post about {}.",
    "Explain {} to a ten-year-old.",
    "What are the advantages and disadvantages of {}?",
    "Write a letter to a friend about {}.",
    "List five facts about {}, each with a sentence of explanation.",
    "How has {} changed over the last hundred years?",
    "You are an expert on {}. Introduce yourself and answer the most common question about it.",
    "Write a Python function that has something to do with {}, and explain it.",
    "Write a short story in which {} plays a part.",
    "Compare {} with what it replaced.",
    "Who was important in the history of {}?",
    "Give step-by-step advice to somebody who is new to {}.",
    "Write a polite email to your manager that asks for an afternoon off because of {}.",
    "Which five questions should one ask an expert on {}?",
    "Pretend that you are a grumpy old sailor and tell me what you think of {}.",
    "Write a poem about {}.",
    "Describe {} in two sentences.",
    "What is a common misunderstanding about {}, and what is true?",
    "Draft the introduction of a talk on {} for an audience of students.",
    "Suggest three titles for a book about {}, and say why each is good.",
    "Write an SQL table and two queries for a shop that deals with {}.",
    "Tell me a joke about {} and explain why it is funny.",
    "Summarize what is known about {} in one paragraph.",
    "Write a dialogue between two friends who disagree about {}.",
    "How does {} work?",
    "What does one have to know about {} before an exam?",
    "Write a review of a museum about {}.",
    "What would the world be like without {}?",
)
SUBJECTS = _listed(
    """
    bicycles, bread, the steam engine, vaccines, inflation, chess, photosynthesis, black holes,
    the Roman Empire, volcanoes, jazz, the printing press, databases, solar power, elections,
    the human heart, coral reefs, cheese, maps, the violin, space travel, gravity, electric
    cars, tea, robots, the Olympic Games, bees, encryption, the ocean tides, libraries,
    bridges, football, earthquakes, statistics, the telephone, public transport, gardening, the
    stock market, dinosaurs, poetry, airships, climate change, the water cycle, democracy,
    knitting, the immune system, satellites, coffee, lighthouses, the silk road, machine
    learning, yoga, plate tectonics, the calendar, cameras, public speaking, opera, the food
    chain, glass, insurance, wind turbines, the French Revolution, antibiotics, board games,
    the solar system, marathon running, batteries, rice, sleep, the alphabet, supply and
    demand, penguins, paper, the internet, comets, cooking for a family, the atom, trains,
    migration of birds, remote work
    """
)
WHO = (
    "Die Regierung",
    "Der Bürgermeister von Bremen",
    "Ein Sprecher der Bahn",
    "Die Europäische Union",
    "Der Verein",
    "Die junge Ärztin",
    "Das Unternehmen aus Stuttgart",
    "Die Polizei",
    "Eine Gruppe von Forschern",
    "Der frühere Minister",
    "Die Lehrerin",
    "Der Präsident",
)
WHEN = (
    "hat am Dienstag",
    "hat im vergangenen Jahr",
    "hat nach langen Verhandlungen",
    "hat trotz der Krise",
    "hat zum ersten Mal",
    "hat ohne Vorankündigung",
)
WHAT = (
    "einen neuen Plan für den Bau von Wohnungen vorgestellt.",
    "mehr Geld für Schulen und Krankenhäuser gefordert.",
    "die Ergebnisse einer großen Untersuchung veröffentlicht.",
    "den Vertrag mit dem Trainer um zwei Jahre verlängert.",
    "vor den Folgen des Klimawandels für die Landwirtschaft gewarnt.",
    "die Preise für Strom und Gas deutlich gesenkt.",
    "drei Verdächtige in der Nähe des Bahnhofs festgenommen.",
    "ein altes Haus am Fluss gekauft, in dem einmal ein Dichter lebte.",
    "sich mit Vertretern der Gewerkschaft auf höhere Löhne geeinigt.",
    "die Reise nach Japan wegen des schlechten Wetters verschoben.",
    "ein Buch über die Geschichte der Stadt geschrieben, das viele Leser gefunden hat.",
    "erklärt, dass die Brücke im Frühjahr wieder geöffnet werden soll.",
)
CLOSED_BOOK = (
    "What is the capital of {}?",
    "Which languages are spoken in {}?",
    "When did {} become a state?",
    "What is the largest river in {}?",
    "Who is the best-known writer of {}?",
    "What is the national dish of {}?",
    "How many people live in {}?",
    "What is the highest mountain in {}?",
    "what is the currency of {}",
    "who won the last election in {}",
    "where is {} on the map?",
    "which countries border {}",
)
OF_SUBJECTS = (
    "who invented {}",
    "when did people first hear of {}?",
    "where do {} come from",
    "what is the meaning of {}",
    "who wrote the best-known book about {}?",
    "what is another word for {}?",
)
COUNTRIES = _listed(
    """
    Norway, Peru, Kenya, Japan, Portugal, India, Canada, Egypt, Poland, Brazil, Vietnam,
    Greece, Mexico, Ireland, Turkey, Chile, Finland, Morocco, Austria, Thailand, Hungary,
    Ghana, Iceland, Colombia, Nepal
    """
)
SUMMARIES = (
    "Summarize: {}",
    "{}\n\nSummarize this article in two or three sentences.",
    "Summarize: {}",
    "Write the key points of this article as a list.\n\n{}",
)
PASSAGES = (
    "{}\n\n{}",
    "Answer the question with the help of the passage.\n\nPassage: {}\n\nQuestion: {}",
)


class Source(NamedTuple):
    """A repository's folder, with a work tree or without."""

    folder: Path

    def rows(self, path: str) -> list[dict[str, Any]]:
        lines = self._git("show", f"HEAD:{path}").split("\n")
        return [json.loads(line) for line in lines if line.strip()]

    def files(self, folder: str) -> list[str]:
        return self._git("ls-tree", "--name-only", "HEAD", f"{folder}/").splitlines()

    def _git(self, *words: str) -> str:
        command = ["git", "-C", str(self.folder), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def of_grade_school(source: Source) -> list[str]:
    return [row["question"] for row in source.rows("grade_school_math/data/train.jsonl")]


def of_self_instruct(source: Source) -> Iterator[str]:
    for path in ("data/seed_tasks.jsonl", "human_eval/user_oriented_instructions.jsonl"):
        for row in source.rows(path):
            for instance in row["instances"]:
                yield "\n\n".join(filter(None, (row["instruction"], instance["input"])))
    for path in source.files(T0):
        if Path(path).name.startswith(SETS):
            yield from (row["prompt"].strip() for row in source.rows(path))
    articles = source.rows(f"{T0}/cnn_dailymail_3_0_0_news_summary.jsonl")
    for number, row in enumerate(articles):
        article = max(row["prompt"].split("\n"), key=len)[:MAX_PASSAGE]
        yield SUMMARIES[number % len(SUMMARIES)].format(article)
    contexts = source.rows(f"{T0}/quoref_Given_Context_Answer_Question.jsonl")
    for number, row in enumerate(contexts):
        question, *_, context = [part for part in row["prompt"].split("\n") if part.strip()]
        yield PASSAGES[number % len(PASSAGES)].format(context[:MAX_PASSAGE], question)
        yield question  # alone, from memory
    plots = source.rows(f"{T0}/duorc_SelfRC_answer_question.jsonl")
    for number, row in enumerate(plots):
        told = row["prompt"]
        question = told.split("Question: ")[1].split("\nMovie plot title:")[0]
        plot = told.split("Movie plot: ")[1]
        yield PASSAGES[number % len(PASSAGES)].format(plot[:MAX_PASSAGE], question)


def of_our_own() -> Iterator[str]:
    pairs = list(itertools.product(TASKS, SUBJECTS))
    yield from (task.format(subject) for task, subject in pairs)
    german = list(itertools.product(WHO, WHEN, WHAT))
    for words in german:
        yield "Translate German to English: " + " ".join(words)
    questions = [
        *itertools.product(CLOSED_BOOK, COUNTRIES),
        *itertools.product(OF_SUBJECTS, SUBJECTS),
    ]
    yield from (question.format(about) for question, about in questions)


def main() -> None:
    """Write the prompts as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grade_school_math", type=Path)
    parser.add_argument("self_instruct", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(1)
    found = [
        *of_grade_school(Source(arguments.grade_school_math)),
        *of_self_instruct(Source(arguments.self_instruct)),
        *of_our_own(),
    ]
    prompts = unlike(
        list(dict.fromkeys(prompt[:MAX_CHARACTERS].strip() for prompt in found)),
        data_folder() / FILE,
    )
    rng.shuffle(prompts)
    for text in prompts:
        print(json.dumps({"prompt": text}, ensure_ascii=False))
    print(f"{len(prompts)} prompts of {len(found)}", file=sys.stderr)


if __name__ == "__main__":
    main()
