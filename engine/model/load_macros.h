// For the loaders of layers: take the value or return the error.
#pragma once

#define LOAD_CONCAT_INNER(a, b) a##b
#define LOAD_CONCAT(a, b) LOAD_CONCAT_INNER(a, b)
#define LOAD_OR_RETURN_IMPL(result, target, expression) \
  auto result = (expression);                           \
  if (!result.ok()) return result.status();             \
  target = *std::move(result)
#define LOAD_OR_RETURN(target, expression) LOAD_OR_RETURN_IMPL(LOAD_CONCAT(loaded_, __LINE__), target, expression)
