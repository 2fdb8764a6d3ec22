// Runs one of our programs beside the test.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace memserve::server {

class Program {
 public:
  explicit Program(std::vector<std::string> command) {
    int out[2], error[2], in[2];
    EXPECT_EQ(pipe2(out, O_CLOEXEC) | pipe2(error, O_CLOEXEC) | pipe2(in, O_CLOEXEC), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    posix_spawn_file_actions_adddup2(&actions, error[1], 2);
    std::vector<char*> argv;
    for (std::string& word : command) argv.push_back(word.data());
    argv.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ), 0) << argv[0];
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    close(error[1]);
    in_ = in[1];
    out_ = out[0];
    error_ = error[0];
  }
  ~Program() {
    if (pid_ > 0) {
      Signal(SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    close(in_);
    close(out_);
    close(error_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void Write(const std::string& text) { EXPECT_EQ(write(in_, text.data(), text.size()), static_cast<ssize_t>(text.size())); }
  void CloseInput() { close(std::exchange(in_, -1)); }
  void Signal(int signal) const { kill(pid_, signal); }

  // Reads until standard output, or standard error, holds `text`; false if it ended before.
  bool ReadUntil(const std::string& text) { return ReadUntil(out_text_, text); }
  bool ReadErrorUntil(const std::string& text) { return ReadUntil(error_text_, text); }

  // Waits for the end. 128 + the signal, if one ended it.
  int ExitStatus() {
    while (ReadSome()) {
    }
    int status = 0;
    waitpid(std::exchange(pid_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  const std::string& out() const { return out_text_; }
  const std::string& error() const { return error_text_; }

 private:
  bool ReadUntil(const std::string& all, const std::string& text) {
    while (all.find(text) == std::string::npos) {
      if (!ReadSome()) return false;
    }
    return true;
  }

  // False: both outputs are closed.
  bool ReadSome() {
    pollfd files[2] = {{out_, POLLIN, 0}, {error_, POLLIN, 0}};
    if (poll(files, 2, -1) < 0) return true;
    bool open = false;
    std::string* const texts[2] = {&out_text_, &error_text_};
    for (int i = 0; i < 2; ++i) {
      if (files[i].revents == 0) {
        open = true;
        continue;
      }
      char buffer[4096];
      const ssize_t count = read(files[i].fd, buffer, sizeof buffer);
      if (count <= 0) continue;
      texts[i]->append(buffer, count);
      open = true;
    }
    return open;
  }

  pid_t pid_ = -1;
  int in_ = -1, out_ = -1, error_ = -1;
  std::string out_text_, error_text_;
};

}  // namespace memserve::server
