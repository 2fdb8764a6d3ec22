// A server on a free port in this process, and a channel to it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "memserve/v1/inference.grpc.pb.h"
#include "memserve/v1/memory.grpc.pb.h"
#include "server/server.h"

namespace memserve::server {

inline ServerOptions OnAnyPort() {
  ServerOptions options;
  options.grpc_address = "127.0.0.1:0";
  return options;
}

// A channel of its own, with connections of its own. It takes 64 KiB ahead of its reader and never more, so that a large message that
// nobody reads stays in flight.
inline std::shared_ptr<grpc::Channel> Connect(int port) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  auto channel = grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials(), arguments);
  // A machine under load may fail a first try; gRPC would then fail all calls for a second.
  channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(20));
  return channel;
}

// How long a reply carries that one should wait, if it says so.
inline std::optional<int64_t> RetrySeconds(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return std::nullopt;
  google::rpc::RetryInfo retry;
  for (const auto& detail : details.details()) {
    if (detail.UnpackTo(&retry)) return retry.retry_delay().seconds();
  }
  return std::nullopt;
}

// All that a stream says.
struct Heard {
  std::vector<v1::Delta> deltas;
  std::vector<v1::Finished> finished;
  grpc::Status status;

  std::string text() const {
    std::string text;
    for (const v1::Delta& delta : deltas) text += delta.text();
    for (const v1::Finished& end : finished) text += end.text();
    return text;
  }
  std::vector<int32_t> token_ids() const {
    std::vector<int32_t> ids;
    for (const v1::Delta& delta : deltas) ids.insert(ids.end(), delta.token_ids().begin(), delta.token_ids().end());
    return ids;
  }
};

inline Heard HearOut(grpc::ClientReader<v1::GenerateResponse>& reader) {
  Heard heard;
  v1::GenerateResponse message;
  while (reader.Read(&message)) {
    if (message.has_delta()) heard.deltas.push_back(message.delta());
    if (message.has_finished()) heard.finished.push_back(message.finished());
  }
  heard.status = reader.Finish();
  return heard;
}

inline Heard Generate(v1::Inference::Stub& stub, const v1::GenerateRequest& request) {
  grpc::ClientContext context;
  return HearOut(*stub.Generate(&context, request));
}

inline v1::GenerateRequest Ask(const std::string& text) {
  v1::GenerateRequest request;
  request.set_text(text);
  return request;
}

}  // namespace memserve::server
