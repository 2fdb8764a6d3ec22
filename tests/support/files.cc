#include "tests/support/files.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "nlohmann/json.hpp"

namespace memserve::testing {

TempFolder::TempFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "memserve-XXXXXX").string();
  path_ = mkdtemp(name.data());
}

TempFolder::~TempFolder() { std::filesystem::remove_all(path_); }

void WriteFile(const std::string& path, const std::string& content) { std::ofstream(path, std::ios::binary) << content; }

std::string ReadWholeFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::map<std::string, StoredTensor> ReadTensors(const std::string& path) {
  const std::string file = ReadWholeFile(path);
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  std::map<std::string, StoredTensor> tensors;
  const nlohmann::json header = nlohmann::json::parse(file.substr(8, length));
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const auto [begin, end] = entry.at("data_offsets").get<std::pair<size_t, size_t>>();
    tensors[name] = {entry.at("dtype"), entry.at("shape"), file.substr(8 + length + begin, end - begin)};
  }
  return tensors;
}

void WriteTensors(const std::string& path, const std::map<std::string, StoredTensor>& tensors) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  const std::string text = header.dump();
  const uint64_t length = text.size();
  WriteFile(path, std::string(reinterpret_cast<const char*>(&length), sizeof(length)) + text + data);
}

}  // namespace memserve::testing
