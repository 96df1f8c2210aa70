// llama.cpp's chat templates, their parsers and their grammars, for a caller that speaks C and JSON.
//
// They are in libllama-common, which has a C++ interface without stable sizes. What crosses it is compiled
// here, from the headers of the very release that is linked, and nothing of it crosses this interface.
//
// A library of its own: libllama-common needs OpenSSL, and the plugin must load without it. It keeps state
// and is not thread-safe. Templates are programs that llama.cpp runs without limits, and they and parsers
// recurse as deep as their input; so a process is to use this that may be lost.
#pragma once

#include <stddef.h>

#define MOE_CHAT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// The release of llama-cpp-python this was compiled for. Another one's structures have other sizes.
MOE_CHAT_API const char * moe_chat_release(void);

// Do what a JSON object asks for under "op", and answer with one: the answer, or {"error": sentence}. Strings
// are UTF-8; the answer is to be freed.
//
//   open    templates {"default", "tool_use"}, bos, eos    -> thinks, caps
//           Everything below needs it. Answers whether reasoning can be switched.
//   apply   messages, tools, and what oaicompat_chat_params_parse of llama-server knows by the same names:
//           tool_choice, parallel_tool_calls, json_schema, grammar, chat_template_kwargs, enable_thinking,
//           reasoning_format, add_generation_prompt, continue_final_message
//                                                          -> prompt, grammar, grammar_lazy, triggers, …
//   parser  id, state                                      -> {}
//           "state" is what apply answered under that name. Needs no template.
//   parse   id, more (to append to the text), partial      -> content, reasoning_content, tool_calls
//           {"unknown": true} for a parser that does not exist, or no longer.
//   schema  schema                                         -> grammar
MOE_CHAT_API char * moe_chat_call(const char * request, size_t n_bytes);
MOE_CHAT_API void   moe_chat_free(char * answer);

#ifdef __cplusplus
}
#endif
