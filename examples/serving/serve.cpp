// Runs a package of AOTInductor on rows of float32, without Python: docs/serving.md says how to build and call it.
//
//     serve model.pt2 width input.f32 output.f32
//
// The input file holds rows of `width` values, the output file gets the rows of the result, both in row order.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>

#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

std::vector<char> read(const std::string& name) {
  std::ifstream file(name, std::ios::binary);
  if (!file) {
    throw std::runtime_error(name + ": cannot be read");
  }
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void run(const std::string& package, int64_t width, const std::string& input, const std::string& output) {
  std::vector<char> bytes = read(input);
  const int64_t values = static_cast<int64_t>(bytes.size() / sizeof(float));
  if (width < 1 || bytes.size() % sizeof(float) != 0 || values % width != 0) {
    throw std::runtime_error(input + ": expected rows of " + std::to_string(width) + " float32 values");
  }
  const torch::Tensor x = torch::from_blob(bytes.data(), {values / width, width}, torch::kFloat32);

  torch::inductor::AOTIModelPackageLoader model(package);
  const torch::Tensor y = model.run({x}).at(0).contiguous();

  std::ofstream file(output, std::ios::binary);
  file.write(reinterpret_cast<const char*>(y.const_data_ptr<float>()), static_cast<std::streamsize>(y.nbytes()));
  if (!file) {
    throw std::runtime_error(output + ": cannot be written");
  }
  std::cout << y.sizes() << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: serve model.pt2 width input.f32 output.f32\n";
    return EXIT_FAILURE;
  }
  try {
    run(argv[1], std::atoll(argv[2]), argv[3], argv[4]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return EXIT_FAILURE;
  }
  return EXIT_SUCCESS;
}
