#include "support/qemu.h"

namespace qcow::test {

Finished qemu_img(Arguments arguments, const std::filesystem::path& directory) {
    arguments.insert(arguments.begin(), "qemu-img");
    return run(arguments, directory);
}

Finished must_qemu_img(Arguments arguments, const std::filesystem::path& directory) {
    arguments.insert(arguments.begin(), "qemu-img");
    return must_run(arguments, directory);
}

Arguments qemu_image(const std::string& name, bool encrypted) {
    if (!encrypted) return {"-f", "qcow2", name};
    return {"--object", "secret,id=s,data=" + std::string(secret_of_tests), "--image-opts",
            "driver=qcow2,encrypt.key-secret=s,file.filename=" + name};
}

Arguments joined_arguments(Arguments first, const Arguments& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

Finished qemu_check(const std::string& name, bool encrypted, const std::filesystem::path& directory) {
    return qemu_img(joined_arguments({"check"}, qemu_image(name, encrypted)), directory);
}

Finished qemu_compare_with_raw(const std::string& name, bool encrypted, const std::string& raw,
                               const std::filesystem::path& directory) {
    auto arguments = joined_arguments({"compare"}, qemu_image(name, encrypted));
    if (encrypted) {
        arguments.push_back("driver=raw,file.filename=" + raw);
    } else {
        arguments.insert(arguments.begin() + 1, {"-F", "raw"});
        arguments.push_back(raw);
    }
    return qemu_img(arguments, directory);
}

void make_encrypted_image(const std::string& name, const std::string& size, const std::filesystem::path& directory,
                          const std::string& more_options) {
    constexpr int most = 50;
    auto options = std::string("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10");
    if (!more_options.empty()) options += "," + more_options;
    const Arguments create = {"create", "-q", "--object", "secret,id=s,data=x", "-f", "qcow2", "-o",
                              options,  name, size};
    for (int i = 0; i < most; ++i) {
        if (qemu_img(create, directory).status == 0) return;
    }
    must_qemu_img(create, directory);
}

nlohmann::json qemu_img_json(const Arguments& arguments, const std::filesystem::path& directory) {
    return nlohmann::json::parse(must_qemu_img(arguments, directory).out);
}

namespace {

void must_run_qemu_io(const Arguments& opening, const std::vector<std::string>& commands,
                      const std::filesystem::path& directory) {
    // Nothing that tests make needs to survive power loss.
    Arguments arguments = {"qemu-io", "-t", "unsafe"};
    for (const auto& command : commands) {
        arguments.emplace_back("-c");
        arguments.push_back(command);
    }
    const auto finished = must_run(joined_arguments(arguments, opening), directory);
    if (finished.out.find("failed") != std::string::npos) throw std::runtime_error("unexpected: " + finished.text());
}

}  // namespace

void must_qemu_io(const std::string& image, const std::string& format, const std::vector<std::string>& commands,
                  const std::filesystem::path& directory) {
    must_run_qemu_io({"-f", format, image}, commands, directory);
}

void must_qemu_io_on_qcow2(const std::string& image, bool encrypted, const std::vector<std::string>& commands,
                           const std::filesystem::path& directory) {
    must_run_qemu_io(qemu_image(image, encrypted), commands, directory);
}

void qemu_convert_to_raw(const std::string& image, const std::string& format, const std::string& target,
                         const std::string& snapshot, const std::filesystem::path& directory) {
    Arguments arguments = {"convert", "-t", "unsafe", "-f", format, "-O", "raw"};
    if (!snapshot.empty()) arguments.insert(arguments.end(), {"-l", "snapshot.name=" + snapshot});
    arguments.insert(arguments.end(), {image, target});
    must_qemu_img(arguments, directory);
}

}  // namespace qcow::test
