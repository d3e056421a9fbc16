#include "create_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "keys.h"
#include "qemu_words.h"
#include "text.h"

namespace tool {
namespace {

using Name = std::string;
using Value = std::string;

std::unexpected<qcow::Error> refuse_option(const Name& name, std::string what) {
    return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "option " + name, std::move(what)});
}

template <class T>
using Words = std::vector<std::pair<std::string, T>>;

template <class T>
qcow::Result<void> set_word(T& target, const Name& name, const Value& value, const Words<T>& words) {
    std::vector<std::string> known;
    for (const auto& [word, meaning] : words) {
        if (word == value) {
            target = meaning;
            return {};
        }
        known.push_back(word);
    }
    return refuse_option(name, not_one_of(value, known));
}

qcow::Result<void> set_switch(bool& target, const Name& name, const Value& value) {
    const auto is_one_of = [&](std::initializer_list<std::string_view> words) {
        return std::ranges::find(words, value) != words.end();
    };
    const bool on = is_one_of({"on", "yes", "true", "y"});
    if (!on && !is_one_of({"off", "no", "false", "n"})) return refuse_option(name, not_one_of(value, {"on", "off"}));
    target = on;
    return {};
}

qcow::Result<void> set_size(std::uint64_t& target, const Name& name, const Value& value) {
    if (auto wrong = size_text(value); !wrong.empty()) return refuse_option(name, std::move(wrong));
    target = parse_size(value);
    return {};
}

qcow::Result<void> set_name(std::string& target, const Name& name, const Value& value) {
    if (value.empty()) {
        return refuse_option(name, name == "backing_file"
                                       ? "the name is empty; qcow rebase -u -b \"\" makes an image do without one"
                                       : "the name is empty; leave out the option instead");
    }
    target = value;
    return {};
}

/// The name of an option, and the function that sets it.
struct Setter {
    Name name;
    qcow::Result<void> (*set)(NewImageOptions& options, const Name& name, const Value& value);
};

const std::vector<Setter>& setters() {
    using O = NewImageOptions;
    using Set = qcow::Result<void>;
    using enum qcow::Preallocation;
    static const std::vector<Setter> all = {
        {"compat",
         [](O& o, const Name& name, const Value& value) {
             return set_word<unsigned>(o.version, name, value, {{"0.10", 2}, {"1.1", 3}, {"v2", 2}, {"v3", 3}});
         }},
        {"cluster_size",
         [](O& o, const Name& name, const Value& value) { return set_size(o.cluster_size, name, value); }},
        {"refcount_bits",
         [](O& o, const Name& name, const Value& value) -> Set {
             if (auto wrong = whole_number(1, 64)(value); !wrong.empty()) return refuse_option(name, std::move(wrong));
             o.refcount_bits = static_cast<unsigned>(parse_size(value));
             return {};
         }},
        {"lazy_refcounts",
         [](O& o, const Name& name, const Value& value) { return set_switch(o.lazy_refcounts, name, value); }},
        {"extended_l2",
         [](O& o, const Name& name, const Value& value) { return set_switch(o.extended_l2, name, value); }},
        {"compression_type",
         [](O& o, const Name& name, const Value& value) {
             return set_word<qcow::Compression>(o.compression, name, value,
                                                {{"zlib", qcow::Compression::zlib}, {"zstd", qcow::Compression::zstd}});
         }},
        {"preallocation",
         [](O& o, const Name& name, const Value& value) {
             return set_word<qcow::Preallocation>(
                 o.preallocation, name, value,
                 {{"off", off}, {"metadata", metadata}, {"falloc", falloc}, {"full", full}});
         }},
        {"data_file",
         [](O& o, const Name& name, const Value& value) { return set_name(o.data_file_name, name, value); }},
        {"data_file_raw",
         [](O& o, const Name& name, const Value& value) { return set_switch(o.data_file_raw, name, value); }},
        {"backing_file",
         [](O& o, const Name& name, const Value& value) { return set_name(o.backing_name, name, value); }},
        {"backing_fmt",
         [](O& o, const Name& name, const Value& value) {
             return set_word<std::string>(o.backing_format, name, value,
                                          {{"raw", "raw"}, {"qcow", "qcow"}, {"qcow2", "qcow2"}, {"luks", "luks"}});
         }},
        {"size", [](O& o, const Name& name, const Value& value) { return set_size(o.size, name, value); }},
        {"encrypt.format",
         [](O&, const Name& name, const Value& value) -> Set {
             if (value == "aes")
                 return refuse_option(name, "new images do not get the weak encryption \"aes\"; use luks");
             if (value == "luks2") return refuse_option(name, "new images do not get LUKS2; luks stands for LUKS1");
             return value == "luks" ? Set() : refuse_option(name, not_one_of(value, {"luks"}));
         }},
        {"encrypt.key-secret",
         [](O& o, const Name& name, const Value& value) { return set_name(o.encrypt.key_secret, name, value); }},
        {"encrypt.cipher-alg",
         [](O& o, const Name& name, const Value& value) { return set_name(o.encrypt.options.cipher, name, value); }},
        {"encrypt.cipher-mode",
         [](O& o, const Name& name, const Value& value) {
             return set_word<std::string>(o.encrypt.options.cipher_mode, name, value,
                                          {{"xts", "xts"}, {"cbc", "cbc"}, {"ecb", "ecb"}});
         }},
        {"encrypt.ivgen-alg",
         [](O& o, const Name& name, const Value& value) {
             return set_word<std::string>(o.encrypt.options.ivgen, name, value,
                                          {{"plain", "plain"}, {"plain64", "plain64"}, {"essiv", "essiv"}});
         }},
        {"encrypt.ivgen-hash-alg",
         [](O& o, const Name& name, const Value& value) {
             return set_name(o.encrypt.options.ivgen_hash, name, value);
         }},
        {"encrypt.hash-alg",
         [](O& o, const Name& name, const Value& value) { return set_name(o.encrypt.options.hash, name, value); }},
        {"encrypt.iter-time",
         [](O& o, const Name& name, const Value& value) -> Set {
             if (auto wrong = whole_number(1, 1'000'000)(value); !wrong.empty())
                 return refuse_option(name, std::move(wrong));
             o.encrypt.options.iter_time_ms = static_cast<std::uint32_t>(parse_size(value));
             return {};
         }},
        {"encrypt.state",
         [](O& o, const Name& name, const Value& value) {
             return set_word<bool>(o.encrypt.active, name, value, {{"active", true}, {"inactive", false}});
         }},
        {"encrypt.new-secret",
         [](O& o, const Name& name, const Value& value) { return set_name(o.encrypt.new_secret, name, value); }},
        {"encrypt.old-secret",
         [](O& o, const Name& name, const Value& value) { return set_name(o.encrypt.old_secret, name, value); }},
        {"encrypt.keyslot",
         [](O& o, const Name& name, const Value& value) -> Set {
             if (auto wrong = whole_number(0, 7)(value); !wrong.empty()) return refuse_option(name, std::move(wrong));
             o.encrypt.key_slot = static_cast<unsigned>(parse_size(value));
             return {};
         }},
    };
    return all;
}

qcow::Result<void> set_option(NewImageOptions& options, const Name& given, const Value& value) {
    // QEMU calls the options of luks by these names without "encrypt.".
    const auto is_known = [](const Name& name) {
        return std::ranges::find(setters(), name, &Setter::name) != setters().end();
    };
    const auto name = !is_known(given) && is_known("encrypt." + given) ? "encrypt." + given : given;
    const auto setter = std::ranges::find(setters(), name, &Setter::name);
    if (setter != setters().end()) {
        options.given.push_back(name);
        return setter->set(options, name, value);
    }
    if (const auto instead = qemu_option("-o", name))
        return refuse_option(name, fmt::format("it is an option of QEMU that qcow does not have; {}", *instead));
    std::vector<std::string> known;
    for (const auto& other : setters()) known.push_back(other.name);
    return refuse_option(name,
                         fmt::format("there is no option with this name{} (see --help)", did_you_mean(name, known)));
}

}  // namespace

std::vector<std::string> parts_of(std::string_view text) {
    std::vector<std::string> parts(1);
    for (std::size_t i = 0; i < text.size(); ++i) {
        const bool comma = text[i] == ',';
        const bool twice = comma && text.substr(i + 1).starts_with(',');
        if (twice) ++i;
        if (comma && !twice) {
            parts.emplace_back();
        } else {
            parts.back() += text[i];
        }
    }
    return parts;
}

const char* const new_image_help =
    "Options for -o, as name=value, separated by commas (,, stands for a comma in a value), with their defaults:\n"
    "  compat=1.1              1.1 makes version 3, 0.10 version 2\n"
    "  cluster_size=64k        a power of two from 512 to 2M\n"
    "  refcount_bits=16        a power of two from 1 to 64\n"
    "  lazy_refcounts=off      on lets other programs write refcounts late\n"
    "  extended_l2=off         on divides each cluster into 32 subclusters; needs cluster_size=16k or more\n"
    "  compression_type=zlib   zlib or zstd\n"
    "  preallocation=off       off, metadata, falloc (reserves space) or full (writes zeros)\n"
    "  data_file=NAME          store the data in this file: a new or empty one, or a block device\n"
    "  data_file_raw=off       on makes the data file a valid raw image\n"
    "  backing_file=NAME, backing_fmt=FORMAT, size=SIZE\n"
    "  encrypt.format=luks     encrypt the data; for -O luks, leave out \"encrypt.\" in these options:\n"
    "  encrypt.key-secret=ID   the key, a secret of --object (default: --key, or ask on the terminal)\n"
    "  encrypt.cipher-alg=aes-256, encrypt.cipher-mode=xts, encrypt.ivgen-alg=plain64, encrypt.ivgen-hash-alg=sha256,\n"
    "  encrypt.hash-alg=sha256, encrypt.iter-time=2000 (milliseconds that deriving the key takes)";

void add_new_image_options(CLI::App& app, NewImageArguments& arguments) {
    add_options_option(app, arguments.options, "Options of the new image: name=value,... (see below)");
}

CLI::Option* add_options_option(CLI::App& app, std::vector<std::string>& options, const std::string& description,
                                const std::string& name) {
    return app.add_option(name, options, description)
        ->type_name("NAME=VALUE")
        ->allow_extra_args(false)
        ->each([](const std::string& text) {
            const auto parts = parts_of(text);
            if (std::ranges::any_of(parts, [](auto& part) { return part == "help" || part == "?"; }))
                throw CLI::CallForHelp();
        });
}

void add_backing_format_option(CLI::App& app, const std::string& name, NewImageArguments& arguments) {
    one_of(app.add_option(name, arguments.backing_format, "Format of the new image's backing file"),
           {"raw", "qcow", "qcow2", "luks"});
}

qcow::Result<NewImageOptions> parse_options(const std::vector<std::string>& texts) {
    NewImageOptions options;
    for (const auto& text : texts) {
        for (const auto& part : parts_of(text)) {
            if (part.empty()) {
                return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "-o " + text,
                                                   "an option is empty; remove the extra comma"});
            }
            // A name without a value means "on", as with QEMU.
            const auto equals = std::min(part.find('='), part.size());
            const auto value = equals == part.size() ? "on" : part.substr(equals + 1);
            if (auto set = set_option(options, part.substr(0, equals), value); !set) {
                auto error = std::move(set).error();
                if (equals == part.size()) error.what += "; give a value: " + part + "=VALUE";
                return std::unexpected(std::move(error));
            }
        }
    }
    return options;
}

namespace {

/// Sets how the new image is encrypted, if it is.
qcow::Result<void> set_encryption(NewImageOptions& options, qcow::Format format) {
    const auto is_about_it = [](const std::string& name) { return name.starts_with("encrypt."); };
    const bool any = std::ranges::any_of(options.given, is_about_it);
    for (const auto* name : {"encrypt.state", "encrypt.new-secret", "encrypt.old-secret", "encrypt.keyslot"}) {
        if (options.has(name))
            return refuse_option(name, "only qcow amend has it: it changes the key slots of an image");
    }
    if (format != qcow::Format::luks && !any) return {};
    if (format == qcow::Format::qcow2 && !options.has("encrypt.format"))
        return refuse_option("encrypt.format", "the image is not encrypted without it; add encrypt.format=luks");
    if (format == qcow::Format::raw)
        return refuse_option("encrypt.format", "a raw image is not encrypted; use qcow2 or luks");
    options.encryption = options.encrypt.options;
    return {};
}

}  // namespace

qcow::Result<NewImageOptions> parse_create_options(const NewImageArguments& arguments, qcow::Format format) {
    auto options = QCOW_TRY(parse_options(arguments.options));
    if (!arguments.backing.empty()) options.backing_name = arguments.backing;
    if (!arguments.backing_format.empty()) options.backing_format = arguments.backing_format;
    for (const auto& name : {options.backing_name, options.data_file_name}) QCOW_TRY_VOID(verify_names_a_file(name));
    if (options.backing_name.empty() && !options.backing_format.empty()) {
        return std::unexpected(
            qcow::Error{qcow::Errc::invalid_argument, "backing file", "its format is given, but its name is missing"});
    }
    QCOW_TRY_VOID(set_encryption(options, format));
    return options;
}

qcow::Result<NewImageOptions> parse_create_options(const NewImageArguments& arguments, qcow::Format format,
                                                   const std::string& path) {
    auto options = QCOW_TRY(parse_create_options(arguments, format));
    if (!options.encryption) return options;
    warn_of_iter_time(options.encryption->iter_time_ms);
    const auto& secret = options.encrypt.key_secret;
    options.encryption->key = QCOW_TRY(secret.empty() ? new_key(path) : new_secret_of(secret));
    return options;
}

}  // namespace tool
