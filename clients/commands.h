// The commands of memserve-client. Each returns the program's exit status.
#pragma once

#include "clients/options.h"

namespace memserve::clients {

inline constexpr int kOk = 0;
inline constexpr int kUsage = 1;
inline constexpr int kRpcError = 2;
inline constexpr int kInterrupted = 130;

// From here on Ctrl-C cancels the call that runs, and a second one ends the program. Before any other thread starts.
void CatchInterrupts();

int Complete(const Options& options);
int Chat(const Options& options);
int Repeat(const Options& options);
int Score(const Options& options);
int Tokenize(const Options& options);
int Detokenize(const Options& options);
int Model(const Options& options);
int Load(const Options& options);
int LoadTest(const Options& options);
int Tables(const Options& options);
int Rows(const Options& options);
int RowStats(const Options& options);
int Trace(const Options& options);
int Abort(const Options& options);

// One line on stderr.
int UsageError(const char* what);

}  // namespace memserve::clients
