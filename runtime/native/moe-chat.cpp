#include "moe-chat.h"

#include <chat.h>
#include <json-schema-to-grammar.h>
#include <log.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <string>

using json = common_json;

namespace {

struct parser {
    common_chat_parser_params params;
    std::string               text;
    uint64_t                  used = 0;  // when
};

constexpr size_t MAX_PARSERS = 512;  // of answers that nobody finished reading, the oldest are forgotten

struct templates {
    common_chat_templates_ptr plain;
    common_chat_templates_ptr tool_use;  // only where a model has one of its own for tools
};

templates                     opened;
std::map<std::string, parser> parsers;
uint64_t                      now = 0;

void forget_oldest() {
    const auto oldest =
        std::min_element(parsers.begin(), parsers.end(), [](const auto & a, const auto & b) { return a.second.used < b.second.used; });
    parsers.erase(oldest);
}

const common_chat_templates * any_template() {
    if (!opened.plain) {
        throw std::runtime_error("no template was opened");
    }
    return opened.plain.get();
}

// common_chat_templates_init, with its reason where it fails: it throws that as a bare std::exception.
common_chat_templates_ptr compiled(const std::string & source, const std::string & bos, const std::string & eos) {
    try {
        return common_chat_templates_init(nullptr, source, bos, eos);
    } catch (const std::exception &) {
        common_chat_template again(source, bos, eos);
        throw;
    }
}

json open(const json & request) {
    const json        sources = request.at("templates");
    const std::string bos = request.value("bos", ""), eos = request.value("eos", "");
    opened       = {};
    opened.plain = compiled(sources.at("default").get<std::string>(), bos, eos);
    if (sources.contains("tool_use")) {
        opened.tool_use = compiled(sources.at("tool_use").get<std::string>(), bos, eos);
    }
    json caps = json::object();
    for (const auto & [name, has] : common_chat_templates_get_caps((opened.tool_use ? opened.tool_use : opened.plain).get())) {
        caps[name] = has;
    }
    return {{"thinks", common_chat_templates_support_enable_thinking(opened.plain.get())}, {"caps", caps}};
}

common_chat_templates_inputs inputs_of(const json & request) {
    common_chat_templates_inputs inputs;
    inputs.messages               = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.tools                  = common_chat_tools_parse_oaicompat(request.value("tools", json()));
    inputs.tool_choice            = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", "auto"));
    inputs.parallel_tool_calls    = request.value("parallel_tool_calls", false);
    inputs.json_schema            = request.contains("json_schema") ? request.at("json_schema").dump() : "";
    inputs.grammar                = request.value("grammar", "");
    inputs.add_generation_prompt  = request.value("add_generation_prompt", true);
    inputs.continue_final_message = common_chat_continuation_parse(request.value("continue_final_message", json()));
    inputs.enable_thinking        = request.value("enable_thinking", true);
    inputs.reasoning_format       = common_reasoning_format_from_name(request.value("reasoning_format", "deepseek"));
    const json kwargs             = request.value("chat_template_kwargs", json::object());
    for (const auto & [name, value] : kwargs.items()) {
        inputs.chat_template_kwargs[name] = value.dump();
    }
    return inputs;
}

const char * trigger_name(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:
            return "token";
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:
            return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN:
            return "pattern";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL:
            return "pattern_full";
    }
    throw std::runtime_error("unknown kind of trigger");
}

json apply(const json & request) {
    any_template();
    const auto inputs   = inputs_of(request);
    const bool tools    = !inputs.tools.empty() && opened.tool_use;
    const auto applied  = common_chat_templates_apply((tools ? opened.tool_use : opened.plain).get(), inputs);
    const bool goes_on  = inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE;
    json       triggers = json::array();
    for (const auto & trigger : applied.grammar_triggers) {
        triggers.push_back({{"type", trigger_name(trigger.type)}, {"value", trigger.value}, {"token", trigger.token}});
    }
    return {
        {"prompt", applied.prompt},
        {"grammar", applied.grammar},
        {"grammar_lazy", applied.grammar_lazy},
        {"triggers", triggers},
        {"preserved_tokens", applied.preserved_tokens},
        {"additional_stops", applied.additional_stops},
        {"generation_prompt", applied.generation_prompt},
        {"supports_thinking", applied.supports_thinking},
        {"thinking_start_tag", applied.thinking_start_tag},
        {"thinking_end_tags", applied.thinking_end_tags},
        {"message_delimiters", applied.message_delimiters.to_json()},
        {"state",
         {
             {"format", (int)applied.format},
             {"generation_prompt", applied.generation_prompt},
             {"reasoning_format", common_reasoning_format_name(inputs.reasoning_format)},
             {"is_continuation", goes_on},
             {"parser", applied.parser},
         }},
    };
}

json parse(const parser & p, bool is_partial) {
    const common_chat_msg msg   = common_chat_parse(p.text, is_partial, p.params);
    json                  calls = json::array();
    for (const auto & call : msg.tool_calls) {
        calls.push_back({{"id", call.id}, {"name", call.name}, {"arguments", call.arguments}});
    }
    return {{"content", msg.render_content("")}, {"reasoning_content", msg.reasoning_content}, {"tool_calls", calls}};
}

json new_parser(const json & request) {
    while (parsers.size() >= MAX_PARSERS) {
        forget_oldest();
    }
    const json state           = request.at("state");
    auto &     p               = parsers[request.at("id").get<std::string>()];
    p                          = {};
    p.used                     = ++now;
    p.params.format            = (common_chat_format)state.at("format").get<int>();
    p.params.generation_prompt = state.at("generation_prompt").get<std::string>();
    p.params.reasoning_format  = common_reasoning_format_from_name(state.at("reasoning_format").get<std::string>());
    p.params.is_continuation   = state.at("is_continuation").get<bool>();
    if (const auto saved = state.at("parser").get<std::string>(); !saved.empty()) {
        p.params.parser.load(saved);
    }
    return json::object();
}

json parse_more(const json & request) {
    const auto found = parsers.find(request.at("id").get<std::string>());
    if (found == parsers.end()) {
        return {{"unknown", true}};
    }
    found->second.used = ++now;
    found->second.text += request.at("more").get<std::string>();
    return parse(found->second, request.at("partial").get<bool>());
}

json answer(const json & request) {
    const auto op = request.at("op").get<std::string>();
    if (op == "open") {
        return open(request);
    }
    if (op == "apply") {
        return apply(request);
    }
    if (op == "parser") {
        return new_parser(request);
    }
    if (op == "parse") {
        return parse_more(request);
    }
    if (op == "schema") {
        return {{"grammar", json_schema_to_grammar(request.at("schema"), true)}};
    }
    throw std::runtime_error("there is no op " + op);
}

std::string answered(const std::string & request) {
    try {
        return answer(json::parse(request)).dump_safe();
    } catch (const std::bad_alloc &) {
        return "{\"error\": \"it takes too much memory\"}";
    } catch (const std::exception & e) {
        return json{{"error", std::string(e.what())}}.dump_safe();
    } catch (...) {
        return "{\"error\": \"llama.cpp failed without saying why\"}";
    }
}

}  // namespace

const char * moe_chat_release(void) { return MOE_CHAT_RELEASE; }

char * moe_chat_call(const char * request, size_t n_bytes) {
    common_log_set_verbosity_thold(LOG_LEVEL_OUTPUT);  // what matters is in the exceptions
    return strdup(answered(std::string(request, n_bytes)).c_str());
}

void moe_chat_free(char * answer) { free(answer); }
