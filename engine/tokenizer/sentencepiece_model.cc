#include "engine/tokenizer/sentencepiece_model.h"

#include <sentencepiece_processor.h>

namespace memserve::engine {

struct SentencePieceModel::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceModel::SentencePieceModel() : impl_(std::make_unique<Impl>()) {}
SentencePieceModel::~SentencePieceModel() = default;

std::unique_ptr<SentencePieceModel> SentencePieceModel::Parse(const std::string& serialized, std::string* error) {
  std::unique_ptr<SentencePieceModel> model(new SentencePieceModel);
  const auto status = model->impl_->processor.LoadFromSerializedProto(serialized);
  if (status.ok() && model->size() > 0) return model;
  *error = status.ok() ? "it has no pieces" : status.ToString();
  return nullptr;
}

int SentencePieceModel::size() const { return impl_->processor.GetPieceSize(); }
std::string SentencePieceModel::piece(int id) const { return impl_->processor.IdToPiece(id); }
PieceKind SentencePieceModel::kind(int id) const {
  const auto& p = impl_->processor;
  if (p.IsControl(id) || p.IsUnused(id)) return PieceKind::kSpecial;
  if (p.IsByte(id)) return PieceKind::kByte;
  return p.IsUnknown(id) ? PieceKind::kUnknown : PieceKind::kNormal;
}
int SentencePieceModel::bos_id() const { return impl_->processor.bos_id(); }
int SentencePieceModel::eos_id() const { return impl_->processor.eos_id(); }

bool SentencePieceModel::Encode(const std::string& text, std::vector<int>* ids, std::string* error) const {
  const auto status = impl_->processor.Encode(text, ids);
  if (!status.ok()) *error = status.ToString();
  return status.ok();
}

}  // namespace memserve::engine
