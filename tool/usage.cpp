#include "usage.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

#include "qemu_words.h"
#include "text.h"

namespace tool {
namespace {

constexpr std::size_t name_column = 28;
constexpr std::size_t help_columns = 100;

/// Breaks the text into lines of at most `width` bytes. A longer word gets a line of its own.
std::string wrapped(const std::string& text, std::size_t width) {
    std::string result;
    std::size_t column = 0;
    for (std::size_t at = 0; at < text.size();) {
        const auto end = std::min(text.find_first_of(" \n", at), text.size());
        const auto length = end - at;
        if (column != 0) {
            const bool fits = column + 1 + length <= width;
            result += fits ? ' ' : '\n';
            column = fits ? column + 1 : 0;
        }
        result.append(text, at, length);
        column += length;
        at = end + 1;
    }
    return result;
}

/// "qcow", "qcow read"
std::string full_name(const CLI::App& app) {
    return app.get_parent() == nullptr ? app.get_name() : app.get_parent()->get_name() + " " + app.get_name();
}

std::vector<const CLI::App*> commands_of(const CLI::App& root) {
    return root.get_subcommands([](const CLI::App*) { return true; });
}

/// "-f", "--format", ...
std::vector<std::string> options_of(const CLI::App& app) {
    std::vector<std::string> options;
    for (const auto* option : app.get_options()) {
        for (const auto& name : option->get_snames()) options.push_back("-" + name);
        for (const auto& name : option->get_lnames()) options.push_back("--" + name);
    }
    return options;
}

bool contains(const std::vector<std::string>& words, std::string_view word) {
    return std::ranges::find(words, word) != words.end();
}

std::string unknown_option(const CLI::App& app, const std::string& argument) {
    const bool root = app.get_parent() == nullptr;
    const auto word = argument.substr(0, argument.find('='));
    const auto option = word.starts_with("--") ? word : argument.substr(0, 2);  // "-T4" is -T and its value
    if (const auto instead = qemu_option(root ? "" : app.get_name(), option))
        return fmt::format("{} is an option of QEMU that {} does not have; {}", option, full_name(app), *instead);
    if (root && std::ranges::any_of(commands_of(app), [&](auto* c) { return contains(options_of(*c), option); }))
        return fmt::format("{} belongs after the command (see qcow --help)", option);
    const auto known = options_of(app);
    const bool one_dash = contains(known, "-" + word);
    return fmt::format("there is no option {}{} (see {} --help)", one_dash ? word : option,
                       did_you_mean(one_dash ? "-" + word : option, known), full_name(app));
}

/// Stands in front of an argument that follows "--".
constexpr std::string_view positional_mark = "\x01positional\x01";

std::string without_mark(std::string text) {
    if (text.starts_with(positional_mark)) text.erase(0, positional_mark.size());
    return text;
}

}  // namespace

void mark_positionals(std::vector<std::string>& arguments) {
    if (arguments.empty()) return;
    const auto mark = std::find(arguments.begin() + 1, arguments.end(), "--");  // the first one is the command
    if (mark == arguments.end()) return;
    for (auto argument = arguments.erase(mark); argument != arguments.end(); ++argument)
        if (argument->starts_with('-')) argument->insert(0, positional_mark);
}

void unmark_positionals(CLI::App& app) {
    for (auto* option : app.get_options()) {
        if (!option->get_positional()) continue;
        option->transform(CLI::Validator(
            [](std::string& text) {
                text = without_mark(text);
                return std::string();
            },
            ""));
    }
}

Help::Help() {
    column_width(name_column);
    label("Positionals", "Arguments");
    label("SUBCOMMAND", "COMMAND");
}

std::string Help::make_option_opts(const CLI::Option* option) const {
    if (option->get_positional() && option->get_option_text().empty()) return {};
    auto text = CLI::Formatter::make_option_opts(option);
    // Each occurrence of a repeatable option has one value.
    if (const auto dots = text.find(" ..."); dots != std::string::npos && !option->get_allow_extra_args())
        text.erase(dots, 4);
    return text;
}

std::string Help::make_option_desc(const CLI::Option* option) const {
    return wrapped(option->get_description(), help_columns - name_column);
}

std::string usage_of(const CLI::App& app) {
    const auto name = full_name(app);
    const auto line = std::dynamic_pointer_cast<CLI::Formatter>(app.get_formatter())->make_usage(&app, name);
    const auto begin = line.find(name);  // "Usage: ...\n"
    return line.substr(begin, line.find('\n', begin) - begin);
}

std::string unknown_command(const CLI::App& root, const std::string& name) {
    if (name == "help") return "use qcow --help, or qcow COMMAND --help";
    if (const auto instead = qemu_command(name))
        return fmt::format("{} is a command of QEMU that qcow does not have; {}", name, *instead);
    std::vector<std::string> known;
    for (const auto* command : commands_of(root)) known.push_back(command->get_name());
    std::error_code none_there;
    const auto meant = std::filesystem::exists(name, none_there)
                           ? "; a file goes after its command, such as qcow info FILE"
                           : did_you_mean(name, known);
    return fmt::format("there is no command \"{}\"{} (see qcow --help)", name, meant);
}

std::string explain(const CLI::App& root, const CLI::ParseError& error) {
    const auto selected = root.get_subcommands();
    const auto& app = selected.empty() ? root : *selected.back();
    // An unknown option first: it may be the cause of the other errors.
    for (const auto* parsed : {&root, &app}) {
        const auto extra = parsed->remaining();
        const auto option = std::ranges::find_if(extra, [](auto& text) { return text.starts_with('-'); });
        if (option != extra.end()) return unknown_option(*parsed, *option);
    }
    const std::string what = error.what();
    if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
        auto extra = app.remaining();
        if (extra.empty()) extra = root.remaining();
        if (extra.empty()) extra.emplace_back();
        return fmt::format("\"{}\" is one argument too many; usage: {}", without_mark(extra.front()), usage_of(app));
    }
    if (dynamic_cast<const CLI::RequiredError*>(&error) != nullptr) {
        if (selected.empty()) return "the command is missing (see qcow --help)";
        const auto name = what.substr(0, what.find(' '));
        return fmt::format("{} is missing; usage: {}", name, usage_of(app));
    }
    if (dynamic_cast<const CLI::ArgumentMismatch*>(&error) != nullptr) {
        const auto name = what.substr(0, what.find(':'));
        if (const auto* option = app.get_option_no_throw(name); option != nullptr && option->get_expected_max() > 0)
            return fmt::format("{} needs a value: {} (see {} --help)", name, option->get_type_name(), full_name(app));
    }
    if (dynamic_cast<const CLI::ConversionError*>(&error) != nullptr) {
        const auto value = std::min(what.find("--"), what.size());
        return fmt::format("invalid value: {} (see {} --help)", what.substr(value), full_name(app));
    }
    return fmt::format("{} (see {} --help)", what, full_name(app));
}

}  // namespace tool
