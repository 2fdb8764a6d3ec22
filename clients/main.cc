// memserve-client: a terminal client of memserve.v1.
#include <cstdio>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "clients/commands.h"
#include "clients/flags.h"
#include "clients/options.h"

namespace memserve::clients {
namespace {

constexpr char kHelp[] = R"(memserve-client COMMAND [WORDS] [--FLAG=VALUE ...]

Asks a memserve server over gRPC.

Commands:
  complete PROMPT                   stream a completion to standard output; - reads the prompt from standard input
  chat                              talk to the model: a line of standard input is a message, the answers stream; ends with the input
  score CONTEXT CONTINUATION...     log-probability of each continuation after the context, and whether it is the greedy one
  tokenize TEXT                     token ids of a text (- reads it from standard input)
  detokenize ID...                  text of token ids
  model                             what is loaded, and its limits
  load                              what the server is doing right now
  tables                            the value tables of the loaded model
  rows ROW...                       the values of rows of a value table
  row-stats [ROW...]                how often rows were read: in all, the top ones, and those given
  trace PROMPT                      the rows that fire for each token of a prompt: position, token id, layer, memory head, row, weight
  abort REQUEST_ID...               end running or waiting requests
  repeat PROMPT                     stream the same completion again and again and print microseconds a token
  load_test                         many streams at once: throughput, latencies and refusals, a line per point

Flags of all commands:
  --address=HOST:PORT               default 127.0.0.1:50051
  --timeout_seconds=S               give up after so long (default: never)
  --json                            print one JSON object a line per message, with the field names of the proto

Flags of complete, chat:
  --system=TEXT                     the chat's first message, of the role system

Flags of complete, tokenize, trace, repeat:
  --allow_special                   names of special tokens in the text, such as <|im_end|>, give these tokens (default: text)

Flags of complete, score, tokenize, trace, repeat:
  --add_bos=on|off                  put the begin-of-sequence token in front of text (default: on where the tokenizer has one;
                                    of tokenize: off)

Flags of complete, chat, score, trace, repeat:
  --token_ids                       prompts are token ids such as 1,2,3, and complete prints ids instead of text
  --memory=on|off                   whether the memory layers take part (default on)
  --memory_knn=N                    so many rows for each memory head (default: all that the model reads)
  --memory_layers=N,...             layers whose memory takes part (default: all that have one)
  --masked_rows=N,...               rows of the value table that are left out
  --priority=N                      -1000 to 1000, higher goes first (default 0)
  --prefix_cache=on|off             whether prompts that begin alike share what was computed (default on)
  --cache_salt=TEXT                 share only with requests of the same salt
  --model=NAME                      refuse to be answered by another model
  --request_id=ID                   a name for abort and the server's logs (default: the server draws one)

Flags of complete, chat, repeat:
  --max_tokens=N                    default: the checkpoint's, else what fits (of repeat: 64)
  --temperature=X                   0 to 100, 0 is greedy (default: the checkpoint's, else 0)
  --top_k=N                         the N most likely tokens only, 0: all (default: the checkpoint's, else 0)
  --top_p=X                         more than 0 and at most 1 (default: the checkpoint's, else 1)
  --seed=N                          default: the server draws one, and --stats shows it
  --min_p=X --typical_p=X           0 to 1 (default: off); see the proto for these and for the penalties
  --repetition_penalty=X            more than 0 (default 1)
  --presence_penalty=X --frequency_penalty=X
                                    -100 to 100 (default 0)
  --min_tokens=N                    draw at least so many (default 0)
  --stop=TEXT                       end before this text; may be repeated
  --include_stop                    print the text that stops, too
  --bad_word=TEXT                   never say this; may be repeated
  --speculate=N                     guess up to N tokens (at most 16) from what stands before, and verify them: the same answer
  --ignore_eos=on|off               go on after an end-of-sequence token (default off, of repeat: on)

Flags of complete, chat:
  --stats                           print counts and times to standard error (default: if that is a terminal)

Flags of complete:
  --chat                            the prompt is a user's message to a chat, written out by the model's template
  --logprobs                        print a line per token: log-probability, id, text (JSON string)
  --top_logprobs=N                  with --json: beside each token so many of the likeliest, at most 20
  --prompt_logprobs=N               with --json: log-probabilities of the prompt's tokens too, and so many of the likeliest beside each
  --echo                            print the prompt first
  --n=N                             so many answers, at most 128; each begins with its number
  --best_of=N                       draw so many and print the --n likeliest
  --truncate_prompt=N               of a longer prompt the last N tokens
  --trace                           print a line per row that fired: position, token id, layer, memory head, row, weight

Flags of complete --trace, trace:
  --trace_entries=N                 the N entries of largest weight of each memory head (default: all)
  --trace_tokens=N                  of the first N tokens drawn; of trace: of the last N of the prompt (default: all)

Flags of rows, row-stats:
  --layer=N                         a layer that reads the table (default: the first with memory)
Flags of row-stats:
  --top=N                           how many of the rows read most, at most 1000 (default 10)
  --reset                           count from 0 again after this

Flags of repeat:
  --count=N                         measured streams, after one that warms up (default 10)

Flags of load_test (also --temperature and the others above; --timeout_seconds is the deadline of each request):
  --concurrency=LIST                closed loop: so many streams at all times, a point for each number (default 1,4,16,64 where no
                                    other point is asked for)
  --requests=N                      of a point of the closed loop (default: 4 for each stream; with --seconds as many as fit)
  --rates=LIST                      open loop: Poisson arrivals, requests a second
  --load_factors=LIST               the same in multiples of the capacity, such as 0.5,1,1.5,2,3
  --capacity=R                      requests a second (default: the most that a closed loop of this run finished)
  --seconds=S                       of arrivals in a point (default of an open loop: 10); figures are of its last four fifths
  --prompts=FILE                    prompts, a line each (default: random token ids)
  --prompt_tokens=N                 of a random prompt (default 64), from half to one and a half times so many
  --output_tokens=N                 drawn for each, whatever the model says (default 64), likewise spread (of --prompts: --max_tokens)
  --shared_prefix_tokens=N          that all random prompts begin with, beside their own (default 0)
  --ttft_slo_ms=X --itl_slo_ms=X    goodput counts requests whose first token came within X ms and the others every X ms on average
  --long_prompt_tokens=N            instead: a prompt of so many tokens arrives beside running streams; their largest gap meanwhile
  --streams=N                       running then (default 8)
  --json_file=FILE                  write all figures there

After -- all words are taken as they are. Ctrl-C cancels the call.
Exit status: 0 success, 1 usage, 2 the call failed (CODE: message on standard error), 130 cancelled by Ctrl-C.

Examples:
  memserve-client complete "The capital of Iceland is"
  memserve-client complete --temperature=0.8 --top_p=0.9 --seed=7 --max_tokens=40 "Once upon a time"
  memserve-client complete --memory=off --stats $'Q: What is the capital of Peru?\nA:' --stop=$'\n'
  echo "The chemical symbol of gold is" | memserve-client complete --json -
  memserve-client chat --system="You answer in one sentence."
  memserve-client score "The capital of France is" " Paris" " London"
  memserve-client trace --trace_entries=1 "The capital of Iceland is"
  memserve-client row-stats --top=20 --reset
  memserve-client --address=127.0.0.1:50052 model
)";

struct Command {
  int (*run)(const Options&);
  std::vector<std::string> groups;  // of flags that it takes
};

const std::map<std::string, Command>& Commands() {
  static const auto* const commands = new std::map<std::string, Command>{
      {"complete", {Complete, {"all", "bos", "special", "ids", "prompt", "generate", "stats", "system", "complete", "trace"}}},
      {"chat", {Chat, {"all", "prompt", "generate", "stats", "system"}}},
      {"score", {Score, {"all", "bos", "ids", "prompt"}}},
      {"tokenize", {Tokenize, {"all", "bos", "special"}}},
      {"detokenize", {Detokenize, {"all"}}},
      {"model", {Model, {"all"}}},
      {"load", {Load, {"all"}}},
      {"tables", {Tables, {"all"}}},
      {"rows", {Rows, {"all", "table"}}},
      {"row-stats", {RowStats, {"all", "table", "row-stats"}}},
      {"trace", {Trace, {"all", "bos", "special", "ids", "prompt", "trace"}}},
      {"abort", {Abort, {"all"}}},
      {"load_test", {LoadTest, {"all", "prompt", "generate", "load_test"}}},
      {"repeat", {Repeat, {"all", "bos", "special", "ids", "prompt", "generate", "repeat"}}},
  };
  return *commands;
}

std::vector<std::string> GroupsOf(const std::string& command) {
  const auto found = Commands().find(command);
  return found == Commands().end() ? std::vector<std::string>() : found->second.groups;
}

std::optional<std::string> ReadCommandLine(int argc, char** argv, Options& options, bool& help) {
  Flags flags;
  flags.AddSwitch("help", "all", help);
  flags.Add("address", "all", "HOST:PORT", Into(options.address));
  flags.Add("timeout_seconds", "all", "a number", Into(options.timeout_seconds));
  flags.AddSwitch("json", "all", options.json);
  flags.Add("add_bos", "bos", "on or off", Into(options.add_bos));
  flags.AddSwitch("allow_special", "special", options.allow_special);
  flags.AddSwitch("token_ids", "ids", options.token_ids);
  flags.Add("memory", "prompt", "on or off", Into(options.memory));
  flags.Add("memory_knn", "prompt", "a whole number", Into(options.memory_knn));
  flags.Add("memory_layers", "prompt", "layers such as 6,12,18", Into(options.memory_layers));
  flags.Add("masked_rows", "prompt", "rows such as 17,1000", Into(options.masked_rows));
  flags.AddSwitch("trace", "complete", options.trace);
  flags.Add("trace_entries", "trace", "a whole number", Into(options.trace_entries));
  flags.Add("trace_tokens", "trace", "a whole number", Into(options.trace_tokens));
  flags.Add("layer", "table", "a whole number", Into(options.layer));
  flags.Add("top", "row-stats", "a whole number", Into(options.top));
  flags.AddSwitch("reset", "row-stats", options.reset);
  flags.Add("priority", "prompt", "a whole number", Into(options.priority));
  flags.Add("prefix_cache", "prompt", "on or off", Into(options.prefix_cache));
  flags.Add("cache_salt", "prompt", "text", Into(options.cache_salt));
  flags.Add("model", "prompt", "a name", Into(options.model));
  flags.Add("request_id", "prompt", "a name", Into(options.request_id));
  flags.Add("max_tokens", "generate", "a whole number", Into(options.max_tokens));
  flags.Add("temperature", "generate", "a number", Into(options.temperature));
  flags.Add("top_k", "generate", "a whole number", Into(options.top_k));
  flags.Add("top_p", "generate", "a number", Into(options.top_p));
  flags.Add("min_p", "generate", "a number", Into(options.min_p));
  flags.Add("typical_p", "generate", "a number", Into(options.typical_p));
  flags.Add("repetition_penalty", "generate", "a number", Into(options.repetition_penalty));
  flags.Add("presence_penalty", "generate", "a number", Into(options.presence_penalty));
  flags.Add("frequency_penalty", "generate", "a number", Into(options.frequency_penalty));
  flags.AddSwitch("include_stop", "generate", options.include_stop);
  flags.Add("bad_word", "generate", "a text", Into(options.bad_words));
  flags.Add("speculate", "generate", "a whole number", Into(options.speculate));
  flags.Add("prompt_logprobs", "complete", "a whole number", Into(options.prompt_logprobs));
  flags.AddSwitch("echo", "complete", options.echo);
  flags.Add("n", "complete", "a whole number", Into(options.n));
  flags.Add("best_of", "complete", "a whole number", Into(options.best_of));
  flags.Add("truncate_prompt", "complete", "a whole number", Into(options.truncate_prompt));
  flags.Add("min_tokens", "generate", "a whole number", Into(options.min_tokens));
  flags.Add("top_logprobs", "complete", "a whole number", Into(options.top_logprobs));
  flags.Add("seed", "generate", "a whole number from 0 to 2^64-1", Into(options.seed));
  flags.Add("stop", "generate", "a text", Into(options.stop));
  flags.Add("ignore_eos", "generate", "on or off", Into(options.ignore_eos));
  flags.AddSwitch("logprobs", "complete", options.logprobs);
  flags.AddSwitch("stats", "stats", options.stats);
  flags.AddSwitch("chat", "complete", options.chat);
  flags.Add("system", "system", "a text", Into(options.system));
  flags.Add("count", "repeat", "a whole number", Into(options.count));
  flags.Add("concurrency", "load_test", "numbers apart by commas", Into(options.concurrency));
  flags.Add("rates", "load_test", "numbers apart by commas", Into(options.rates));
  flags.Add("load_factors", "load_test", "numbers apart by commas", Into(options.load_factors));
  flags.Add("requests", "load_test", "a whole number", Into(options.requests));
  flags.Add("seconds", "load_test", "a number", Into(options.seconds));
  flags.Add("capacity", "load_test", "a number", Into(options.capacity));
  flags.Add("prompts", "load_test", "a file", Into(options.prompts_file));
  flags.Add("prompt_tokens", "load_test", "a whole number", Into(options.prompt_tokens));
  flags.Add("output_tokens", "load_test", "a whole number", Into(options.output_tokens));
  flags.Add("shared_prefix_tokens", "load_test", "a whole number", Into(options.shared_prefix_tokens));
  flags.Add("ttft_slo_ms", "load_test", "a number", Into(options.ttft_slo_ms));
  flags.Add("itl_slo_ms", "load_test", "a number", Into(options.itl_slo_ms));
  flags.Add("long_prompt_tokens", "load_test", "a whole number", Into(options.long_prompt_tokens));
  flags.Add("streams", "load_test", "a whole number", Into(options.streams));
  flags.Add("json_file", "load_test", "a file", Into(options.json_file));
  std::optional<std::string> wrong = flags.Read(argc, argv, GroupsOf, options.words);
  if (options.words.empty()) return wrong;
  options.command = options.words.front();
  options.words.erase(options.words.begin());
  return wrong;
}

int Main(int argc, char** argv) {
  Options options;
  bool help = false;
  const std::optional<std::string> wrong = ReadCommandLine(argc, argv, options, help);
  if (help || options.command == "help") {
    std::fputs(kHelp, stdout);
    return kOk;
  }
  if (wrong) return UsageError(wrong->c_str());
  if (options.command.empty()) return UsageError("give a COMMAND");
  const auto command = Commands().find(options.command);
  if (command == Commands().end()) return UsageError(("there is no command " + options.command).c_str());
  CatchInterrupts();
  return command->second.run(options);
}

}  // namespace

int UsageError(const char* what) {
  std::fprintf(stderr, "memserve-client: %s; see memserve-client --help\n", what);
  return kUsage;
}

}  // namespace memserve::clients

int main(int argc, char** argv) { return memserve::clients::Main(argc, argv); }
