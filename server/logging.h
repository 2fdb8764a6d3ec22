// Where log lines go: spdlog's default logger, to stderr. gRPC's own lines join it at debug level, since what matters of them
// reaches us as a status.
#pragma once

#include "server/options.h"

namespace memserve::server {

void SetUpLogging(const ServerOptions& options);

}  // namespace memserve::server
