#include "engine/tokenizer/sentencepiece_model.h"

#include <dlfcn.h>
#include <sentencepiece_processor.h>

#include <new>
#include <type_traits>

// Debian's libsentencepiece carries an old protobuf of its own and exports it under protobuf's names. Linked beside the real libprotobuf,
// which gRPC brings, each calls into the other and the program dies before main. So it is opened by hand, in a scope of its own where
// it finds itself first. Its classes are used through their virtual functions; the three others that are needed are looked up.

namespace memserve::engine {
namespace {

using sentencepiece::SentencePieceProcessor;
using sentencepiece::util::Status;

struct Library {
  void (*construct_processor)(void*) = nullptr;
  void (*destroy_status)(void*) = nullptr;
  const char* (*error_message)(const void*) = nullptr;
  std::string error;  // empty: it is open
};

Library Open() {
  int mode = RTLD_NOW | RTLD_LOCAL;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  mode |= RTLD_DEEPBIND;  // sanitizers refuse it, and their builds have no protobuf
#endif
  Library library;
  void* const handle = dlopen("libsentencepiece.so.0", mode);
  const auto find = [&](const char* symbol, auto& function) {
    void* const found = handle == nullptr ? nullptr : dlsym(handle, symbol);
    if (found == nullptr && library.error.empty()) library.error = dlerror();
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
  find("_ZN13sentencepiece22SentencePieceProcessorC1Ev", library.construct_processor);
  find("_ZN13sentencepiece4util6StatusD1Ev", library.destroy_status);
  find("_ZNK13sentencepiece4util6Status13error_messageEv", library.error_message);
  return library;
}

// Opened for the first model and never closed.
const Library& TheLibrary() {
  static const Library* const library = new Library(Open());
  return *library;
}

// What the compiler calls where a Status ends.
void DestroyStatus(void* status) __asm__("_ZN13sentencepiece4util6StatusD1Ev");
__attribute__((used)) void DestroyStatus(void* status) { TheLibrary().destroy_status(status); }

}  // namespace

struct SentencePieceModel::Impl {
  Impl() { TheLibrary().construct_processor(storage); }
  ~Impl() { processor().~SentencePieceProcessor(); }
  // Laundered, so that every call goes through the library's own table.
  SentencePieceProcessor& processor() { return *std::launder(reinterpret_cast<SentencePieceProcessor*>(storage)); }

  alignas(SentencePieceProcessor) std::byte storage[sizeof(SentencePieceProcessor)];
};

SentencePieceModel::SentencePieceModel() : impl_(std::make_unique<Impl>()) {}
SentencePieceModel::~SentencePieceModel() = default;

std::unique_ptr<SentencePieceModel> SentencePieceModel::Parse(const std::string& serialized, std::string* error) {
  if (!TheLibrary().error.empty()) {
    *error = TheLibrary().error;
    return nullptr;
  }
  std::unique_ptr<SentencePieceModel> model(new SentencePieceModel);
  const Status status = model->impl_->processor().LoadFromSerializedProto(serialized);
  if (status.ok() && model->size() > 0) return model;
  *error = status.ok() ? "it has no pieces" : TheLibrary().error_message(&status);
  return nullptr;
}

int SentencePieceModel::size() const { return impl_->processor().GetPieceSize(); }
std::string SentencePieceModel::piece(int id) const { return impl_->processor().IdToPiece(id); }
PieceKind SentencePieceModel::kind(int id) const {
  const SentencePieceProcessor& p = impl_->processor();
  if (p.IsControl(id) || p.IsUnused(id)) return PieceKind::kSpecial;
  if (p.IsByte(id)) return PieceKind::kByte;
  return p.IsUnknown(id) ? PieceKind::kUnknown : PieceKind::kNormal;
}
int SentencePieceModel::bos_id() const { return impl_->processor().bos_id(); }
int SentencePieceModel::eos_id() const { return impl_->processor().eos_id(); }

bool SentencePieceModel::Encode(const std::string& text, std::vector<int>* ids, std::string* error) const {
  const Status status = impl_->processor().Encode(text, ids);
  if (!status.ok()) *error = TheLibrary().error_message(&status);
  return status.ok();
}

}  // namespace memserve::engine
