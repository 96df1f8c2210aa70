// The reason of the last failed step, for whoever called llama.cpp and got only a number back.
#pragma once

#include <mutex>
#include <string>

namespace moe {

enum error_kind { ERROR_NONE = 0, ERROR_READ = 1, ERROR_OTHER = 2 };

class failure {
  public:
    void set(error_kind kind, const std::string & sentence) {
        std::lock_guard<std::mutex> lock(mutex_);
        kind_     = kind;
        sentence_ = sentence;
    }
    // What it was, and forgets it.
    error_kind take(std::string & sentence) {
        std::lock_guard<std::mutex> lock(mutex_);
        const error_kind            kind = kind_;
        sentence.swap(sentence_);
        sentence_.clear();
        kind_ = ERROR_NONE;
        return kind;
    }

  private:
    std::mutex  mutex_;
    error_kind  kind_ = ERROR_NONE;
    std::string sentence_;
};

}  // namespace moe
