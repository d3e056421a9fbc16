// Writes the manual pages and the completions for bash, zsh and fish. Everything comes from the tool's own command-line
// parser.
//
//   qcow-documents DIRECTORY      makes the files below DIRECTORY, in the layout of share/

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "command.h"
#include "usage.h"

namespace tool {
namespace {

std::vector<const CLI::App*> commands_of(const CLI::App& app) {
    return app.get_subcommands([](const CLI::App*) { return true; });
}

std::vector<const CLI::Option*> flags_of(const CLI::App& app) {
    return app.get_options([](const CLI::Option* option) { return option->nonpositional(); });
}

/// "-f", "--format"
std::vector<std::string> spellings(const CLI::Option& option) {
    std::vector<std::string> result;
    for (const auto& name : option.get_snames()) result.push_back("-" + name);
    for (const auto& name : option.get_lnames()) result.push_back("--" + name);
    return result;
}

bool takes_value(const CLI::Option& option) { return option.get_expected_max() > 0; }

/// Returns the values of an option whose type is a list like "{raw,qcow2}", separated by spaces; else an empty string.
std::string choices(const CLI::Option& option) {
    const auto type = option.get_type_name();
    const auto begin = type.find('{');
    const auto end = type.find('}', begin);
    if (end == std::string::npos) return {};
    auto words = type.substr(begin + 1, end - begin - 1);
    std::ranges::replace(words, ',', ' ');
    return words;
}

/// Returns `text` with `escape` before each character in `special`.
std::string escaped(std::string_view text, std::string_view special, std::string_view escape) {
    std::string result;
    for (const char c : text) {
        if (special.find(c) != std::string_view::npos) result += escape;
        result += c;
    }
    return result;
}

// ---- manual pages ----

std::string roff(std::string_view text) {
    std::string result;
    for (const char c : text) {
        // At the start of a line, a full stop or an apostrophe would begin a request.
        if ((c == '.' || c == '\'') && (result.empty() || result.back() == '\n')) result += "\\&";
        if (c == '\\') {
            result += "\\e";
        } else {
            result += c == '-' ? "\\-" : std::string(1, c);
        }
    }
    return result;
}

std::string entry(const std::string& what, const std::string& description) {
    return fmt::format(".TP\n{}\n{}\n", what, roff(description));
}

std::string manual_page(const CLI::App& app, const CLI::App* parent) {
    const std::string name = parent == nullptr ? app.get_name() : parent->get_name() + " " + app.get_name();
    std::string page_name = name;
    std::ranges::replace(page_name, ' ', '-');
    std::string page = fmt::format(".TH {} 1 \"\" \"qcowkit " QCOW_VERSION "\"\n", roff(page_name));
    page += fmt::format(".SH NAME\n{} \\- {}\n", roff(page_name), roff(app.get_description()));
    page += fmt::format(".SH SYNOPSIS\n{}\n", roff(usage_of(app)));
    std::string arguments;
    const auto positionals = app.get_options([](const CLI::Option* option) { return option->get_positional(); });
    for (const auto* option : positionals) {
        arguments += entry(fmt::format("\\fI{}\\fR {}", roff(option->get_name(true)), roff(option->get_option_text())),
                           option->get_description());
    }
    if (!arguments.empty()) page += ".SH ARGUMENTS\n" + arguments;
    std::string list;
    for (const auto* command : commands_of(app)) {
        list += entry(fmt::format("\\fB{}\\fR", roff(command->get_name())), command->get_description());
    }
    if (!list.empty()) page += ".SH COMMANDS\n" + list;
    page += ".SH OPTIONS\n";
    for (const auto* option : flags_of(app)) {
        std::string what;
        for (const auto& spelling : spellings(*option))
            what += fmt::format("{}\\fB{}\\fR", what.empty() ? "" : ", ", roff(spelling));
        if (takes_value(*option)) what += fmt::format(" \\fI{}\\fR", roff(option->get_type_name()));
        page += entry(what, option->get_description());
    }
    page += fmt::format(".SH NOTES\n.nf\n{}\n.fi\n", roff(app.get_footer()));
    std::string others;
    for (const auto* command : commands_of(parent == nullptr ? app : *parent)) {
        if (command != &app)
            others += fmt::format("{}\\fBqcow\\-{}\\fR(1)", others.empty() ? "" : ", ", roff(command->get_name()));
    }
    page += fmt::format(".SH SEE ALSO\n{}{}\n", parent == nullptr ? "" : "\\fBqcow\\fR(1), ", others);
    return page;
}

// ---- completions ----

std::string bash_completion(const CLI::App& root) {
    const auto words = [](const CLI::App& app) {
        std::string result;
        for (const auto* option : flags_of(app)) {
            for (const auto& spelling : spellings(*option)) result += spelling + " ";
        }
        return result;
    };
    std::string names;
    std::string options;
    std::string values;
    for (const auto* command : commands_of(root)) {
        names += command->get_name() + " ";
        options += fmt::format("        {}) words=\"{}\" ;;\n", command->get_name(), words(*command));
        for (const auto* option : flags_of(*command)) {
            if (!takes_value(*option)) continue;
            std::string pattern;
            for (const auto& spelling : spellings(*option))
                pattern += fmt::format("{}\"{} {}\"", pattern.empty() ? "" : "|", command->get_name(), spelling);
            values += choices(*option).empty()
                          ? fmt::format("        {}) COMPREPLY=($(compgen -f -- \"$word\")); return ;;\n", pattern)
                          : fmt::format("        {}) COMPREPLY=($(compgen -W \"{}\" -- \"$word\")); return ;;\n",
                                        pattern, choices(*option));
        }
    }
    return fmt::format(
        "_qcow() {{\n"
        "    local word=${{COMP_WORDS[COMP_CWORD]}} words\n"
        "    if [ \"$COMP_CWORD\" -eq 1 ]; then\n"
        "        COMPREPLY=($(compgen -W \"{}{}\" -- \"$word\"))\n"
        "        return\n"
        "    fi\n"
        "    case \"${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD - 1]}}\" in\n"
        "{}"
        "    esac\n"
        "    case \"${{COMP_WORDS[1]}}\" in\n"
        "{}"
        "    esac\n"
        "    case \"$word\" in\n"
        "        -*) COMPREPLY=($(compgen -W \"$words\" -- \"$word\")) ;;\n"
        "        *) COMPREPLY=($(compgen -f -- \"$word\")) ;;\n"
        "    esac\n"
        "}}\n"
        "complete -o filenames -F _qcow qcow\n",
        names, words(root), values, options);
}

std::string zsh_completion(const CLI::App& root) {
    const auto text = [](std::string_view description) {
        // In single quotes, between brackets.
        std::string result;
        for (const char c : escaped(description, "[]:\\", "\\")) result += c == '\'' ? "'\\''" : std::string(1, c);
        return result;
    };
    std::string names;
    std::string cases;
    for (const auto* command : commands_of(root)) {
        names += fmt::format("    '{}:{}'\n", command->get_name(), text(command->get_description()));
        cases += fmt::format("    {}) _arguments", command->get_name());
        for (const auto* option : flags_of(*command)) {
            const auto values = choices(*option);
            const auto value = !takes_value(*option) ? std::string()
                               : values.empty()      ? ":value:_files"
                                                     : fmt::format(":value:({})", values);
            for (const auto& spelling : spellings(*option)) {
                cases += fmt::format(" \\\n        '{}[{}]{}'", spelling, text(option->get_description()), value);
            }
        }
        cases += " \\\n        '*:file:_files' ;;\n";
    }
    return fmt::format(
        "#compdef qcow\n"
        "local -a commands\n"
        "commands=(\n{})\n"
        "if (( CURRENT == 2 )); then\n"
        "    _describe command commands\n"
        "    return\n"
        "fi\n"
        "shift words\n"
        "(( CURRENT-- ))\n"
        "case $words[1] in\n{}esac\n",
        names, cases);
}

std::string fish_completion(const CLI::App& root) {
    const auto quoted = [](std::string_view text) { return "'" + escaped(text, "'\\", "\\") + "'"; };
    std::string result;
    for (const auto* command : commands_of(root)) {
        result += fmt::format("complete -c qcow -n __fish_use_subcommand -f -a {} -d {}\n", command->get_name(),
                              quoted(command->get_description()));
        for (const auto* option : flags_of(*command)) {
            result += fmt::format("complete -c qcow -n '__fish_seen_subcommand_from {}'", command->get_name());
            for (const auto& name : option->get_snames()) result += " -s " + name;
            for (const auto& name : option->get_lnames()) result += " -l " + name;
            const auto values = choices(*option);
            if (!values.empty()) {
                result += " -xa " + quoted(values);
            } else if (takes_value(*option)) {
                result += " -r";
            }
            result += " -d " + quoted(option->get_description()) + "\n";
        }
    }
    return result;
}

void write(const std::filesystem::path& path, const std::string& text) {
    std::filesystem::create_directories(path.parent_path());
    std::ofstream file(path, std::ios::binary);
    file << text;
    if (!file.flush()) throw std::runtime_error("cannot write " + path.string());
}

void write_all(const std::filesystem::path& directory) {
    int status = ok;
    const auto app = make_app(status);
    write(directory / "man/man1/qcow.1", manual_page(*app, nullptr));
    for (const auto* command : commands_of(*app)) {
        write(directory / fmt::format("man/man1/qcow-{}.1", command->get_name()), manual_page(*command, app.get()));
    }
    write(directory / "bash-completion/completions/qcow", bash_completion(*app));
    write(directory / "zsh/site-functions/_qcow", zsh_completion(*app));
    write(directory / "fish/vendor_completions.d/qcow.fish", fish_completion(*app));
}

}  // namespace
}  // namespace tool

int main(int argc, char** argv) {
    try {
        if (argc != 2) throw std::runtime_error("usage: qcow-documents DIRECTORY");
        tool::write_all(argv[1]);
    } catch (const std::exception& error) {
        std::fputs(error.what(), stderr);
        std::fputs("\n", stderr);
        return 1;
    }
    return 0;
}
