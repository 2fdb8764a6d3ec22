// Files for tests: a folder that goes away, and checkpoints made or changed tensor by tensor.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace memserve::testing {

class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

void WriteFile(const std::string& path, const std::string& content);
std::string ReadWholeFile(const std::string& path);

struct StoredTensor {
  std::string dtype;  // as safetensors spells it
  std::vector<int64_t> shape;
  std::string bytes;
};

template <typename T>
StoredTensor MakeTensor(const std::string& dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
  return {dtype, std::move(shape), std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T))};
}

// Of one safetensors file.
std::map<std::string, StoredTensor> ReadTensors(const std::string& path);
void WriteTensors(const std::string& path, const std::map<std::string, StoredTensor>& tensors);

}  // namespace memserve::testing
