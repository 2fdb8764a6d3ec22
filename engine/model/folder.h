// Which files of a checkpoint folder may be symbolic links. A folder from elsewhere must not make the server read other files of the
// machine, so a link has to stay in the folder. One exception: the layout of Hugging Face's hub cache, where snapshots/REVISION/FILE
// points to ../../blobs/HASH.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace memserve::engine {

// OK for what is no link, or is not there. INVALID_ARGUMENT: a link that leads out of the folder that `path` lies in.
absl::Status CheckLink(const std::string& path);

}  // namespace memserve::engine
