// Parsers of files from outside, each as a function of bytes that must return whatever they are. tests/fuzz/*_fuzz.cc give them to libFuzzer;
// fuzz_test.cc feeds them mutations of good files.
#pragma once

#include <string>

namespace memserve::fuzz {

void SafetensorsHeader(const std::string& bytes);
void SafetensorsIndex(const std::string& bytes);
void ModelConfig(const std::string& bytes);
void GenerationConfig(const std::string& bytes);

}  // namespace memserve::fuzz
